"""Small videos for the tests: every frame shows its own number."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A moving pattern with the number in binary as bright and dark blocks along the top (8 blocks)."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([(3 * x + 5 * number) % 256, (4 * y + 7 * number) % 256, (2 * x + 3 * y) % 256], -1)
    image = image.astype(np.uint8)
    block = width // 8
    for bit in range(8):
        image[: height // 3, bit * block : (bit + 1) * block] = 255 if number >> bit & 1 else 0
    return image


def number_of(image: np.ndarray) -> int:
    """The number a decoded frame (H, W, 3) shows."""
    height, width = image.shape[:2]
    block = width // 8
    top = image[2 : height // 3 - 2].mean((0, 2))
    return sum(int(top[bit * block + 2 : (bit + 1) * block - 2].mean() > 127) << bit for bit in range(8))


def write_video(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    size: tuple[int, int] = (48, 64),
    max_b_frames: int | None = None,
    gop: int | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """``frames`` numbered frames; ``times`` are their time stamps in 1/100 s (default: every 4)."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if max_b_frames is not None:
            stream.codec_context.max_b_frames = max_b_frames
        if gop is not None:
            stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_padded_video(path: Path, frames: int, before: Sequence[int]) -> Path:
    """``frames`` numbered frames in MPEG-4; before those numbered ``before``, or after the last one, packets
    without a picture ("VOP not coded")."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        packets = [
            packet
            for i in range(frames)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24"))
        ]
        packets += stream.encode(None)
        base, first, step = packets[0].time_base, packets[0].pts, packets[1].pts - packets[0].pts
        for place in sorted(before, reverse=True):
            packets.insert(place, av.Packet(b"\0\0\1\xb6\x50\x4f"))
        for i, packet in enumerate(packets):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, base, *[first + step * i] * 2
        container.mux(packets)
    return path


def hide_frame(path: Path, number: int) -> Path:
    """Clear ``show_frame`` in a frame of a VP8 file: it is decoded, but not shown."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        frame = bytes(packets[number])
    content = path.read_bytes()
    assert content.count(frame) == 1
    path.write_bytes(content.replace(frame, bytes([frame[0] & ~0x10]) + frame[1:]))
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Give an mp4 file the display matrix ((a, b, 0), (c, d, 0), (0, 0, 1))."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16  # type, version and flags, times, layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def write_folder(path: Path, frames: int = 12, pattern: str = "{:05d}.jpg", first: int = 1) -> Path:
    path.mkdir(parents=True)
    for i in range(frames):
        Image.fromarray(picture(i)).save(path / pattern.format(first + i), quality=95)
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """Every frame, in order, by plain decoding: the reference."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

"""Reading T sampled frames of a video: seeking against decoding everything.

    python benchmarks/decoding.py                                   two clips made for it
    python benchmarks/decoding.py clip.mp4 folder_of_frames ...     your own

For each file: milliseconds a clip (opening included, median over repeats, one random training clip each), and
sampled frames per second. ``seek`` is what VideoDataset does; ``decode`` decodes to the end and converts only
the sampled frames; ``decode + convert`` converts every frame to RGB; ``torchcodec`` (when it can be imported)
asks its VideoDecoder for the same frames. ``exact`` says whether the frames equal those of a full decode
bit by bit, otherwise the largest difference in grey levels and how many of the sampled frames differ by more
than 32 levels somewhere (another frame, or another conversion to RGB).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from timing import positive

from temporal_excite.video import SegmentSampler, open_frames, read_frames

Reader = Callable[[Path, list[int]], np.ndarray]


def seek(path: Path, indices: list[int]) -> np.ndarray:
    return read_frames(path, indices).permute(0, 2, 3, 1).numpy()


def decode(path: Path, indices: list[int]) -> np.ndarray:
    return decode_all(path, set(indices), indices)


def decode_and_convert(path: Path, indices: list[int]) -> np.ndarray:
    return decode_all(path, None, indices)


def decode_all(path: Path, converted: set[int] | None, indices: list[int]) -> np.ndarray:
    """Decode to the end; convert the frames ``converted`` (all of them when ``None``)."""
    frames = {}
    convert = av.video.reformatter.VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type = "NONE"
        for i, frame in enumerate(container.decode(stream)):
            if converted is None or i in converted:
                frames[i] = convert.reformat(frame, format="rgb24").to_ndarray()
    return np.stack([frames[i] for i in indices])


def torchcodec(mode: str) -> Reader:
    from torchcodec.decoders import VideoDecoder

    def read(path: Path, indices: list[int]) -> np.ndarray:
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        return decoder.get_frames_at(indices).data.numpy()

    return read


def write_clips(folder: Path) -> list[Path]:
    """300 frames of 320x240: H.264 as its encoder writes it, and MPEG-4 with B-frames in AVI."""
    y, x = np.mgrid[:240, :320]
    paths = []
    for name, codec, b_frames in (("h264.mp4", "libx264", None), ("mpeg4_b_frames.avi", "mpeg4", 2)):
        paths.append(folder / name)
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            for i in range(300):
                picture = np.stack([3 * x + 8 * i, 2 * y - 9 * i, x + y + 7 * i], -1) % 256
                frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return paths


def readers() -> dict[str, Reader]:
    found: dict[str, Reader] = {"seek": seek, "decode": decode, "decode + convert": decode_and_convert}
    try:
        found["torchcodec exact"] = torchcodec("exact")
        found["torchcodec approximate"] = torchcodec("approximate")
    except (ImportError, RuntimeError, OSError) as error:
        print(f"torchcodec left out: {str(error).splitlines()[0]}")
    return found


def compare(got: np.ndarray, wanted: np.ndarray) -> str:
    difference = np.abs(got.astype(int) - wanted.astype(int)).reshape(len(got), -1).max(1)
    if not difference.any():
        return "yes"
    return f"no: up to {difference.max()}, {(difference > 32).sum()} of {len(got)} frames by more than 32"


def measure(path: Path, methods: dict[str, Reader], segments: int, repeats: int) -> None:
    """Print a line for each reader."""
    with open_frames(path) as frames:
        length = len(frames)
    sampler = SegmentSampler(segments, "train")
    clips = [sampler(length, torch.Generator().manual_seed(i))[0].tolist() for i in range(repeats)]
    for name, read in methods.items():
        if path.is_dir() and name != "seek":
            continue
        try:
            exact = (
                "-" if path.is_dir() else compare(read(path, clips[0]), decode_and_convert(path, clips[0]))
            )
            seconds = []
            for clip in clips:
                start = time.perf_counter()
                read(path, clip)
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            print(f"{path.name:24} {length:6}  {name:22} fails: {str(error).splitlines()[0]}")
            continue
        clip_time = statistics.median(seconds)
        print(
            f"{path.name:24} {length:6}  {name:22} {1e3 * clip_time:8.1f} "
            f"{segments / clip_time:9.0f}  {exact}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help="video files and frame folders")
    parser.add_argument("--segments", type=positive, default=8, help="frames per clip")
    parser.add_argument("--repeats", type=positive, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = readers()
    print(f"{args.segments} frames a clip, one thread, median of {args.repeats}")
    print(f"{'file':24} {'frames':>6}  {'reader':22} {'ms/clip':>8} {'frames/s':>9}  exact")
    with tempfile.TemporaryDirectory() as folder:
        for path in args.paths or write_clips(Path(folder)):
            measure(path, methods, args.segments, args.repeats)


if __name__ == "__main__":
    main()

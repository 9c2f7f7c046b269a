"""Frames of one video, a folder of pictures or a video file; only the frames asked for are decoded."""

import bisect
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import need

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"),
    *(".m2ts", ".mts", ".3gp", ".ogv"),
)
_NOT_CODED = 16  # bytes; an MPEG-4 packet that only says "as before" ("VOP not coded") has 5 to 15
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)")


class VideoError(RuntimeError):
    """A video that cannot be read; the message starts with its path.

    Raised in a worker of a DataLoader, it is built anew from one string, the worker's traceback: ``path`` is
    then None and ``problem`` that string.
    """

    def __init__(self, path: Path | str, problem: str | None = None) -> None:
        super().__init__(str(path) if problem is None else f"{path}: {problem}")
        self.path = None if problem is None else Path(path)
        self.problem = str(path) if problem is None else problem

    def __reduce__(self) -> tuple[Any, ...]:  # the error crosses process borders
        return type(self), (self.problem,) if self.path is None else (self.path, self.problem)


class FrameCountError(VideoError):
    """An intact video with fewer frames than its container announces: ``num_frames``."""

    def __init__(self, path: Path, announced: int, num_frames: int) -> None:
        super().__init__(path, f"holds {num_frames} frames where its container announces {announced}")
        self.announced = announced
        self.num_frames = num_frames

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.announced, self.num_frames)


class _Inexact(Exception):
    """Time stamps that do not tell which frame is which."""


def open_frames(path: str | Path, pattern: str | None = None) -> "FrameFolder | VideoFile":
    """The frames of a folder of numbered pictures, or of a video file.

    Both give ``len(frames)`` and ``frames.read(indices) -> uint8 (len(indices), 3, H, W)``, RGB, for 0-based
    indices in any order, and are context managers. ``pattern`` (folders only): see :class:`FrameFolder`.

    Raises :class:`VideoError`, naming the path, for a missing, empty or unreadable video.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path, pattern)
    if not path.exists():
        raise VideoError(path, "no such file or folder")
    return VideoFile(path)


def read_frames(path: str | Path, indices: Sequence[int], pattern: str | None = None) -> Tensor:
    """The frames ``indices`` of one video: :func:`open_frames`, read, close."""
    with open_frames(path, pattern) as frames:
        return frames.read(indices)


def _check(path: Path, indices: Iterable[int], length: int) -> list[int]:
    checked = [int(i) for i in indices]
    wrong = [i for i in checked if not 0 <= i < length]
    if wrong:
        raise IndexError(f"{path}: frame {wrong[0]} asked for, the video has frames 0 .. {length - 1}")
    return checked


def _stack(path: Path, pictures: list[np.ndarray]) -> Tensor:
    """(H, W, 3) pictures as one (n, 3, H, W) tensor, in channels_last memory, fastest to resize."""
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) > 1:
        raise VideoError(path, f"frames of different sizes (height, width): {sorted(sizes)}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) as a player shows it, to the nearest quarter turn.

    The display matrix ((a, b, _), (c, d, _), _) shows column x, row y at column ``a x + c y``, row
    ``b x + d y`` (ISO/IEC 14496-12, "matrix" of the track header).
    """
    a, b, _, c, d = matrix[:5]
    if abs(b) > abs(a):  # columns become rows
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def to_rgb(frame: Any, reformatter: Any) -> np.ndarray:
    """A frame of PyAV as a player shows it, (H, W, 3) RGB."""
    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return picture if matrix is None else _upright(picture, np.frombuffer(matrix, np.int32))


def open_container(path: Path, file: str | None = None, format: str | None = None) -> tuple[Any, Any]:
    """PyAV's container and its video stream; ``file`` and ``format`` where FFmpeg has others for ``path``."""
    need("av", "video", "video files and cameras")
    import av

    try:
        # absolute, as "12:30.mp4" would be of the protocol 12
        container = av.open(str(path.absolute()) if file is None else file, format=format)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, f"not a readable video: {error}") from error
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise VideoError(path, "holds no video stream")
    return container, stream


class FrameFolder:
    """A folder of numbered pictures.

    ``pattern`` names the files, ``"img_{:05d}.jpg"``; numbering may start anywhere (0 and 1 are usual).
    ``None`` finds it: the pictures of the folder must then all have one prefix and one ending.
    The numbers must leave no gap.
    """

    def __init__(self, path: str | Path, pattern: str | None = None) -> None:
        self.path = Path(path)
        names = sorted(entry.name for entry in self.path.iterdir())
        groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name in names:
            match = _NUMBERED.fullmatch(name)
            if match and match[3].lower() in PICTURES:
                if pattern is not None and pattern.format(int(match[2])) != name:
                    continue
                groups.setdefault((match[1], match[3]), []).append((int(match[2]), name))
        if not groups:
            wanted = f"pictures named {pattern!r}" if pattern else "numbered pictures"
            raise VideoError(self.path, f"holds no {wanted} ({len(names)} other files)")
        if len(groups) > 1:
            kinds = ", ".join(f"{prefix}*{suffix} ({len(g)})" for (prefix, suffix), g in groups.items())
            raise VideoError(
                self.path, f'holds several kinds of pictures, {kinds}: pass pattern="img_{{:05d}}.jpg"'
            )
        numbered = sorted(next(iter(groups.values())))
        numbers = [number for number, _ in numbered]
        gap = next((a + 1 for a, b in pairwise(numbers) if b != a + 1), None)
        if gap is not None:
            raise VideoError(
                self.path,
                f"picture number {gap} is missing or doubled ({len(numbers)} pictures, "
                f"numbers {numbers[0]} to {numbers[-1]})",
            )
        self.names = [name for _, name in numbered]

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> "FrameFolder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames ``indices`` (any order, repeats allowed) as uint8 ``(n, 3, H, W)``.

        Raises :class:`VideoError` for a picture that cannot be read, or of another size.
        """
        from PIL import Image, ImageOps

        indices = _check(self.path, indices, len(self))
        pictures = {}
        for i in set(indices):
            file = self.path / self.names[i]
            try:
                with Image.open(file) as image:
                    if image.mode.startswith("I"):  # would be cut off at 255
                        raise VideoError(file, "a grey picture of more than 8 bits: convert it to 8 bits")
                    ImageOps.exif_transpose(image, in_place=True)
                    pictures[i] = np.asarray(image.convert("RGB"))
            except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
                raise VideoError(file, f"not a readable picture: {error}") from error
        return _stack(self.path, [pictures[i] for i in indices])


class VideoFile:
    """A video file, read with PyAV (its wheels bring FFmpeg).

    Opening reads the packets without decoding them: their time stamps, sorted, tell which frame is number i
    and which key frame comes before it. :meth:`read` seeks to that key frame and decodes from there; frames
    in between that nothing refers to (non-reference B-frames) are left out. Frame i is the i-th frame that
    decoding the whole file gives. Where time stamps cannot tell (AVI with B-frames, missing or doubled
    stamps, a stream that starts inside a group of pictures) the file is decoded in order up to the last frame
    asked for; so it is where MPEG-4 packets are so small that they may hold no picture.

    Frames come as a player shows them: turned by quarter turns and mirrored as the file's display matrix says
    (phones), as FFmpeg's ``autorotate`` does.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._container, self._stream = open_container(self.path)
        import av

        self._av = av
        # one for all frames: setting up a conversion costs ten times the conversion
        self._reformatter = av.video.reformatter.VideoReformatter()
        try:
            self._scan()
        except BaseException:
            self._container.close()
            raise

    def _scan(self) -> None:
        # one thread: no delay after a seek, and data loaders already run one process a core
        self._stream.codec_context.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        codec = self._stream.codec_context.name
        packets = []
        doubtful = False
        try:
            for packet in self._container.demux(self._stream):
                if codec == "vp8" and packet.size and not memoryview(packet)[0] & 0x10:
                    continue  # never shown, others refer to it (RFC 6386, Sec. 9.1, "show_frame")
                if packet.size and not packet.is_discard:
                    doubtful |= codec == "mpeg4" and packet.size < _NOT_CODED
                    packets.append((packet.pts, packet.dts, packet.is_keyframe))
        except self._av.FFmpegError as error:
            raise VideoError(self.path, f"broken after {len(packets)} frames: {error}") from error
        if not packets:
            raise VideoError(self.path, "holds no frames")
        self._announced = len(packets)
        self._times: list[int] | None = None
        self._keys: list[tuple[int, int]] = []  # (pts, where to seek)
        times = [pts for pts, _, _ in packets if pts is not None]
        keys = [(pts, pts if dts is None else dts) for pts, dts, key in packets if key and pts is not None]
        # AVI stores no time stamps: those given are guesses unless decoding and display order are the same
        guessed = "avi" in self._container.format.name and any(pts != dts for pts, dts, _ in packets)
        if (
            not (guessed or doubtful)
            and len(set(times)) == len(packets)
            and keys
            and min(keys)[0] == min(times)
        ):
            self._times = sorted(times)
            self._keys = sorted(keys)

    def __len__(self) -> int:
        return self._announced

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames ``indices`` (any order, repeats allowed) as uint8 ``(n, 3, H, W)``.

        Raises :class:`VideoError` for a frame that cannot be decoded and :class:`FrameCountError` when the
        stream ends, without an error, before the last of them.
        """
        indices = _check(self.path, indices, len(self))
        wanted = sorted(set(indices))
        try:
            try:
                pictures = self._seek_and_read(wanted)
            except _Inexact:
                pictures = self._read_in_order(wanted)
        except self._av.FFmpegError as error:
            raise VideoError(self.path, f"cannot be decoded: {error}") from error
        return _stack(self.path, [pictures[i] for i in indices])

    def _seek_and_read(self, wanted: list[int]) -> dict[int, np.ndarray]:
        if self._times is None:
            raise _Inexact
        groups: dict[int, dict[int, int]] = {}  # key frame -> {time stamp: frame index}
        for i in wanted:
            time = self._times[i]
            key = bisect.bisect_right(self._keys, time, key=lambda k: k[0]) - 1
            groups.setdefault(key, {})[time] = i
        pictures: dict[int, np.ndarray] = {}
        for key, targets in groups.items():
            pictures.update(self._read_group(self._keys[key], targets))
        return pictures

    def _read_group(self, key: tuple[int, int], targets: dict[int, int]) -> dict[int, np.ndarray]:
        """The frames at the time stamps ``targets``, between the key frame ``key`` and the next one."""
        key_pts, position = key
        self._container.seek(position, stream=self._stream)
        context = self._stream.codec_context
        intra = self._av.video.frame.PictureType.I
        pictures: dict[int, np.ndarray] = {}
        found = clean = False
        try:
            for packet in self._container.demux(self._stream):
                found = found or (packet.is_keyframe and packet.pts == key_pts)
                if not found:
                    continue
                context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in targets else "NONREF"
                for frame in packet.decode():
                    if frame.pts is None or frame.is_corrupt:
                        raise _Inexact
                    if frame.pts == key_pts:
                        clean = frame.pict_type == intra
                    if frame.pts >= key_pts and not clean:  # a "key frame" that only begins a gradual refresh
                        raise _Inexact
                    if frame.pts in targets:
                        pictures[targets[frame.pts]] = to_rgb(frame, self._reformatter)
                if len(pictures) == len(targets):
                    return pictures
        finally:
            context.skip_frame = "DEFAULT"
        raise _Inexact

    def _read_in_order(self, wanted: list[int]) -> dict[int, np.ndarray]:
        pictures: dict[int, np.ndarray] = {}
        targets = set(wanted)
        count = 0
        with self._av.open(str(self.path.absolute())) as container:
            stream = container.streams[self._stream.index]
            stream.codec_context.thread_type = "NONE"
            for frame in container.decode(stream):
                if count in targets:
                    if frame.is_corrupt:
                        raise VideoError(self.path, f"frame {count} is corrupt")
                    pictures[count] = to_rgb(frame, self._reformatter)
                    if len(pictures) == len(targets):
                        return pictures
                count += 1
        if not count:
            raise VideoError(self.path, "holds no decodable frame")
        raise FrameCountError(self.path, self._announced, count)

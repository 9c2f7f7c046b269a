"""Frames of one video in order, each decoded once: of a file, a folder of pictures, or a camera."""

import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import need
from .decoding import FrameFolder, VideoError, open_container, to_rgb

_PATIENCE = 100  # broken frames in a row before a camera counts as failed


@dataclass(frozen=True)
class Frame:
    """A frame of a video."""

    index: int
    """Counted from 0."""
    time: float
    """Seconds since the first frame, from the time stamps, or where there are none from the rate."""
    picture: Tensor
    """``(3, H, W)`` uint8, RGB."""


def play(source: str | Path, fps: float = 25.0) -> "FolderPlayer | FilePlayer | CameraPlayer":
    """The frames of a video, one after the other, in constant memory.

    All are context managers that give :class:`Frame` when iterated, once, all frames of one size; ``rate``
    is the nominal number of frames a second.

    Args:
        source: a video file, a folder of numbered pictures, or a number that is no path: that camera.
        fps: frames a second where the source does not tell: of a folder.

    Raises:
        VideoError: nothing there, or it cannot be read; while iterating, from where on.
        ValueError: ``fps`` is not from 0.001 to 1000.
    """
    if not 0.001 <= fps <= 1000:
        raise ValueError(f"fps must be from 0.001 to 1000, got {fps}")
    path = Path(source)
    if path.is_dir():
        return FolderPlayer(path, fps)
    if path.exists():
        return FilePlayer(path, fps)
    if str(source).isdecimal():
        return CameraPlayer(int(str(source)), fps)
    raise VideoError(path, "no such file or folder")


class FolderPlayer:
    """A folder of numbered pictures, as :class:`~.decoding.FrameFolder` takes it."""

    def __init__(self, path: Path, fps: float) -> None:
        self._folder = FrameFolder(path)
        self.rate = Fraction(fps).limit_denominator(1001)

    def __enter__(self) -> "FolderPlayer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        frames = ((None, self._folder.read([i])[0]) for i in range(len(self._folder)))
        return _checked(self._folder.path, frames, self.rate)


class FilePlayer:
    """A video file, or what else PyAV opens. Leaves out up to ``patience`` broken frames in a row."""

    def __init__(
        self, path: Path, fps: float, file: str | None = None, format: str | None = None, patience: int = 0
    ) -> None:
        self.path = path
        self._patience = patience
        self._container, self._stream = open_container(path, file, format)
        import av

        self._av = av
        self._reformatter = av.video.reformatter.VideoReformatter()
        # AVI stores no time stamps: those given are guesses where display order is not that of decoding
        self._guessed = "avi" in self._container.format.name and self._stream.codec_context.has_b_frames
        rate = Fraction(self._stream.average_rate or 0).limit_denominator(1001)
        self.rate = rate or Fraction(fps).limit_denominator(1001)

    def __enter__(self) -> "FilePlayer":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        return _checked(self.path, self._decode(), self.rate)

    def _decode(self) -> Iterator[tuple[float | None, Tensor]]:
        count = broken = 0
        try:
            for packet in self._container.demux(self._stream):
                if self._patience and not packet.size:
                    continue  # a buffer that the camera's driver dropped; a decoder would take it for the end
                try:
                    for frame in packet.decode():
                        if frame.is_corrupt:
                            raise VideoError(self.path, f"frame {count} is corrupt")
                        picture = to_rgb(frame, self._reformatter)
                        time = None if self._guessed else frame.time
                        yield time, torch.from_numpy(picture.copy()).permute(2, 0, 1)
                        count, broken = count + 1, 0
                except (self._av.error.InvalidDataError, VideoError):
                    broken += 1
                    if broken > self._patience:
                        raise
        except self._av.FFmpegError as error:
            raise VideoError(self.path, f"cannot be decoded after {count} frames: {error}") from error


class CameraPlayer:
    """A camera: always the newest frame. Frames that arrive while nobody asks are dropped, and their numbers
    skipped. It never ends by itself, nor at single broken frames."""

    def __init__(self, number: int, fps: float) -> None:
        file, format = _camera(number)
        try:
            self._player = FilePlayer(Path(file), fps, file, format, patience=_PATIENCE)
        except VideoError as error:
            raise VideoError(Path(file), f"no camera {number}: {error.problem}") from error
        self.rate = self._player.rate
        self._box: queue.Queue[Frame | BaseException | None] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> "CameraPlayer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2)  # a camera that has gone silent must not hold up the end
        else:
            self._player.__exit__()

    def __iter__(self) -> Iterator[Frame]:
        self._thread.start()
        while (frame := self._box.get()) is not None:
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def _fill(self) -> None:
        last: BaseException | None = None
        with self._player:  # opened and closed where it is read
            try:
                for frame in self._player:
                    if self._stop.is_set():
                        return
                    with suppress(queue.Empty):
                        self._box.get_nowait()  # nobody came for it
                    self._box.put(frame)
            except Exception as error:
                last = error
        while not self._stop.is_set():
            with suppress(queue.Full):
                return self._box.put(last, timeout=0.1)


def _camera(number: int) -> tuple[str, str]:
    """File and format under which FFmpeg opens a camera."""
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        need("av", "video", "cameras")
        import av

        if not hasattr(av, "enumerate_input_devices"):
            raise VideoError(Path(str(number)), "cameras need a newer PyAV here: pip install -U av")
        names = [d.name for d in av.enumerate_input_devices("dshow") if "video" in d.media_types]
        if number >= len(names):
            raise VideoError(
                Path(str(number)), f"no camera {number}; there are: {', '.join(names) or 'none'}"
            )
        return f"video={names[number]}", "dshow"
    return f"/dev/video{number}", "v4l2"


def _checked(path: Path, frames: Iterator[tuple[Any, Tensor]], rate: Fraction) -> Iterator[Frame]:
    """Frames of (time stamp or None, picture): numbered, timed, of one size, at least one."""
    start, size = None, None
    index = -1
    for index, (time, picture) in enumerate(frames):
        if size is None:
            size, start = picture.shape, time
        elif picture.shape != size:
            raise VideoError(
                path,
                f"frames of different sizes (height, width): {tuple(size[1:])}, then "
                f"{tuple(picture.shape[1:])} at frame {index}",
            )
        known = time is not None and start is not None
        yield Frame(index, time - start if known else float(index / rate), picture)
    if index < 0:
        raise VideoError(path, "holds no decodable frame")

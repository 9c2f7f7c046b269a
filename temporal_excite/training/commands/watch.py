"""``temporal-excite watch``."""

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from ..._extras import need
from ...video import play
from ...visual.pictures import check_path
from ..distributed import choose_device, on_sigterm
from ..recognizer import Recognizer
from . import add_device_argument

OVERLAYS = (".mp4", ".mkv", ".mov")


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.epilog = (
        "Prints a line for each frame: its time, the milliseconds from decoded frame to labels, and the best "
        "classes by the softmax of the logits averaged over the window. Stop it with Ctrl-C or SIGTERM."
    )
    parser.add_argument(
        "checkpoint", help="best.pt of a run, a save_pretrained() folder, or hf-hub:owner/name, causal"
    )
    parser.add_argument(
        "source", help="a video file, a folder of numbered pictures, or the number of a camera"
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes to show (default: 3)")
    parser.add_argument(
        "--every", type=int, default=1, metavar="K", help="feed every K-th frame to the network (default: 1)"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="average the last N frames it saw, 0: all since the start (default: the checkpoint's n_segment)",
    )
    parser.add_argument(
        "--overlay", type=Path, metavar="FILE", help=f"write the video with the labels, {', '.join(OVERLAYS)}"
    )
    parser.add_argument(
        "--fps", type=float, default=25.0, help="frames a second of a folder of pictures (default: 25)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each frame the network sees."""
    for name in ("top", "every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.overlay is not None:
        _check_overlay(args.overlay, args.source)
    recognizer = Recognizer.from_checkpoint(args.checkpoint, choose_device(args.device))
    window = recognizer.config.n_segment if args.window is None else args.window
    live = recognizer.live(window or None)
    spent: list[float] = []
    try:
        with (
            on_sigterm(_end),  # as an exception, so that the overlay is closed
            play(args.source, args.fps) as video,
            _Overlay(args.overlay, video.rate) as overlay,
        ):
            due, lines = 0, [""]
            for frame in video:
                if frame.index >= due:
                    due = frame.index + args.every
                    start = time.perf_counter()
                    best = live(frame.picture, args.top)
                    spent.append(1000 * (time.perf_counter() - start))
                    if args.json:
                        predictions = [[p.label, p.score] for p in best]
                        line = {"frame": frame.index, "time": frame.time, "ms": spent[-1]}
                        print(json.dumps(line | {"predictions": predictions}), flush=True)
                    else:
                        shown = "   ".join(f"{100 * p.score:6.2f} %  {p.label}" for p in best)
                        print(f"{frame.time:9.2f} s {spent[-1]:7.1f} ms {shown}", flush=True)
                    lines = [f"{100 * p.score:3.0f} %  {p.label}" for p in best]
                overlay.write(frame.picture, frame.time, [*lines, f"{frame.time:.2f} s  {spent[-1]:.0f} ms"])
    except (KeyboardInterrupt, SystemExit):
        _summarise(spent)
        raise
    _summarise(spent)
    return 0


def _end() -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _summarise(ms: Sequence[float]) -> None:
    if not ms:
        return
    late = statistics.quantiles(ms, n=20, method="inclusive")[-1] if len(ms) > 1 else ms[0]
    middle = statistics.median(ms)
    print(f"{len(ms)} frames, {middle:.1f} ms a frame (95 %: {late:.1f} ms)", file=sys.stderr)


def _check_overlay(path: Path, source: str) -> None:
    check_path(path, OVERLAYS)
    need("av", "video", "video files")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"--overlay {path} is the video to watch: give another name")


class _Overlay:
    """A video file with text on its frames, whole also where writing stops early; nothing for no path."""

    def __init__(self, path: Path | None, rate: Fraction) -> None:
        self.path = path
        self.rate = rate
        self._last = -1
        self._container: Any = None

    def __enter__(self) -> "_Overlay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except _errors() as problem:
            with suppress(*_errors()):
                self._container.close()
            if error is None:
                raise self._failed(problem) from problem

    def write(self, picture: Tensor, seconds: float, lines: Sequence[str]) -> None:
        """Add a frame, ``(3, H, W)`` uint8, at its time."""
        if self.path is None:
            return
        import av

        image = _with_text(picture, lines)
        try:
            if self._container is None:
                self._open(self.path, *image.shape[:2])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            # milliseconds, which must grow
            self._last = frame.pts = max(self._last + 1, round(1000 * seconds))
            frame.time_base = Fraction(1, 1000)
            self._container.mux(self._stream.encode(frame))
        except _errors() as error:
            raise self._failed(error) from error

    def _open(self, path: Path, height: int, width: int) -> None:
        import av

        container = av.open(str(path.absolute()), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = container.add_stream(codec, rate=self.rate)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, 1000)
        self._container = container

    def _failed(self, error: Exception) -> OSError:
        return OSError(f"cannot write {self.path}: {getattr(error, 'strerror', None) or error}")


def _errors() -> tuple[type[Exception], ...]:
    """What PyAV raises where it cannot write."""
    import av

    return av.FFmpegError, OSError, ValueError


def _with_text(picture: Tensor, lines: Sequence[str]) -> np.ndarray:
    """(H, W, 3) with the lines in the upper left corner; H and W even, as encoders want them."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = (side // 2 * 2 for side in picture.shape[1:])
    image = Image.fromarray(picture[:, :height, :width].permute(1, 2, 0).contiguous().numpy())
    size = max(10, height // 20)
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image, "RGBA")
    box = draw.multiline_textbbox((size // 2, size // 2), "\n".join(lines), font)
    draw.rectangle((0, 0, box[2] + size // 2, box[3] + size // 2), fill=(0, 0, 0, 140))
    draw.multiline_text((size // 2, size // 2), "\n".join(lines), "white", font)
    return np.asarray(image)

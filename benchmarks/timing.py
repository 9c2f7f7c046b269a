"""What the timing scripts share."""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from temporal_excite.visual.pictures import PICTURES


def layout(options: argparse.Namespace) -> torch.memory_format:
    """What ``--channels-last`` asks for."""
    return torch.channels_last if options.channels_last else torch.contiguous_format


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes; on a GPU until its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def allow_graphs(count: int) -> None:
    """Let ``torch.compile`` make graphs of so many networks of one class; of those beyond its eighth
    it would make none."""
    torch._dynamo.config.recompile_limit = 8 * count
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def picture_file(name: str) -> Path:
    """An :func:`output_file` that matplotlib can write, where that is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('needs matplotlib: pip install -e ".[plot]"')
    path = output_file(name)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"the ending must be one of {', '.join(PICTURES)}, got {name}")
    return path


def output_file(name: str) -> Path:
    """An argument that names a file to write; known to be wrong before the measurements."""
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {name}: no such folder, or a folder itself")
    return path


def write_rows(path: Path, options: argparse.Namespace, rows: Sequence[Mapping[str, object]]) -> None:
    """The rows as JSON, with what they were measured with."""
    content = {"options": vars(options), "torch": torch.__version__, "rows": rows}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def ratio(times: Mapping[str, Sequence[float]], label: str) -> float:
    """Of a network to the plain one: the median over the repeats of the ratio within a repeat."""
    return statistics.median(a / b for a, b in zip(times[label], times["plain"], strict=True))

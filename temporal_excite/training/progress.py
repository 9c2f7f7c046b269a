"""Progress of a run: a bar, a log of JSON lines, TensorBoard."""

import json
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .distributed import World


class RunLog:
    """Writes ``log.jsonl`` (one JSON object a line), a bar on stderr and TensorBoard scalars.

    ``kind`` of a line is "step" (a training step: epoch, step, loss, top1, lr, clips_per_s, seconds_left) or
    "epoch" (means of the epoch and the validation). Only the main process writes.

    Args:
        folder: of the run.
        world: this process among the others.
        total: training clips of the whole run.
        done: training clips seen before, when the run goes on.
        step: the last step before.
        progress: whether to show the bar.
        tensorboard: whether to write scalars for TensorBoard to ``folder/tensorboard``.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        total: int,
        done: int,
        step: int,
        progress: bool,
        tensorboard: bool,
    ) -> None:
        self.total, self.done, self.seen = total, done, 0
        self.started = time.perf_counter()
        self.writer: Any = None
        if tensorboard and world.main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs the package: pip install tensorboard") from error
            # steps after the checkpoint come again
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.bar = tqdm(
            total=total, initial=done, unit="clip", unit_scale=True, disable=not (progress and world.main)
        )
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8") if world.main else None

    def advance(self, clips: int, **shown: str) -> None:
        """Move the bar on by ``clips``."""
        self.seen += clips
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(clips)

    @property
    def clips_per_s(self) -> float:
        """Training clips in a second since this session of the run began, validation included."""
        return self.seen / (time.perf_counter() - self.started)

    @property
    def seconds_left(self) -> float:
        """Time to the end of the run at that rate."""
        return (self.total - self.done - self.seen) / self.clips_per_s

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line."""
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def read_log(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``, all or those of one kind."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


def truncate_log(folder: Path, step: int, epoch: int) -> None:
    """Drop the log lines that a resumed run will write again: those of steps after its checkpoint, at
    ``step``, and of epochs from ``epoch`` on, which the checkpoint has not finished."""
    path = folder / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            values = json.loads(line)
            closed = values["kind"] != "epoch" or values["epoch"] < epoch
            if line.endswith("\n") and values["step"] <= step and closed:
                kept.append(line)
        except ValueError:
            pass  # the line a killed process was writing
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)

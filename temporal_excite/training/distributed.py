"""One process or many (torchrun): who takes which clips, and sums over all."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler


@dataclass(frozen=True)
class World:
    """This process among all processes of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share_of(self, length: int) -> range:
        """The items of this process when each of ``length`` is evaluated once: no padding, unlike PyTorch's
        ``DistributedSampler``, so counts add up exactly."""
        return range(self.rank, length, self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the processes, in float64."""
        if self.size == 1:
            return list(values)
        # MPS has no float64; gloo and nccl have
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def copy_to_all(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors the main process's values, in place, in every process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def choose_device(device: str | None = None) -> torch.device:
    """The device of a name such as "cpu" or "cuda"; None takes CUDA where there is one."""
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' asked for, but torch sees no CUDA device; use device 'cpu'")
    return wanted


def join_world(device: str | None = None) -> World:
    """The world torchrun describes in the environment, or a world of one.

    ``device``: as :func:`choose_device` takes it. On CUDA each process takes the device of its local rank
    and talks over nccl, else gloo.
    """
    wanted = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(wanted)
    if wanted.type == "cuda":
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(wanted)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo")
    return World(wanted, dist.get_rank(), dist.get_world_size())


def leave_world() -> None:
    """Undo :func:`join_world`."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainBatches(Sampler[list[int]]):
    """The index lists of one epoch for one process.

    The order is a function of (seed, epoch) alone. Optimiser step k of the epoch takes the items
    ``order[k*B : (k+1)*B]``, cut into ``accumulate`` equal passes, and each pass into equal shares for the
    processes: what is averaged in a step does not depend on their number. Items left over at the end of an
    epoch are left out; they change with every epoch. ``group`` consecutive items (0 .. group - 1, and so on)
    always come together, in one pass of one process.
    """

    def __init__(
        self, length: int, batch_size: int, accumulate: int, seed: int, world: World, group: int = 1
    ) -> None:
        parts = accumulate * world.size
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"batch size {batch_size} does not divide into {world.size} process(es) x {accumulate} "
                f"accumulated pass(es): take a multiple of {parts}"
            )
        if length < batch_size:
            raise ValueError(
                f"{length} training clips do not fill one batch of {batch_size}: use a smaller --batch-size"
            )
        share = batch_size // parts
        if share % group or length % group:
            raise ValueError(
                f"{length} training clips, {share} of them in a pass, do not divide into groups of {group}"
            )
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.seed, self.world, self.group = seed, world, group
        self.epoch = 0
        self.start = 0
        """Optimiser steps of the epoch to leave out, when a run goes on in the middle of it."""

    @property
    def steps(self) -> int:
        """Optimiser steps of a whole epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        groups = torch.randperm(self.length // self.group, generator=generator)
        order = (groups[:, None] * self.group + torch.arange(self.group)).flatten()
        order = order[: self.steps * self.batch_size]
        shares = order.view(self.steps, self.accumulate, self.world.size, -1)
        for step in range(self.start, self.steps):
            for part in range(self.accumulate):
                yield shares[step, part, self.world.rank].tolist()


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """While the block runs, a SIGTERM calls ``act``. In the main thread alone, where Python hears of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm(_: int) -> None:
    """For a DataLoader's workers: a SIGTERM to the whole group stops the run through the main process, after
    the step or the validation it is in."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def clear_frames(error: BaseException) -> None:
    """Clear the stack frames of an error. Their variables would keep a DataLoader's workers alive, which
    ignore the SIGTERM that the interpreter sends at exit, and for which it would wait."""
    traceback.clear_frames(error.__traceback__)


def mix(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Memory for results that live for a moment, used again as soon as nothing holds the one before.

A module's output lives until the next layer has read it, what a backward pass computes again until that has
used it. Taken from the allocator each time, it is often fresh memory, of which the first touch of every page
is a fault that costs more than what the module computes.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LEAST, _MOST = 1 << 20, 64 << 20  # bytes; less is cheap anyway, more is not kept
_PIECES = 4  # a module's output and what a pass needs beside it; backward, both again and two gradients


class _Piece:
    """Kept memory."""

    memory: memoryview | None = None
    lease: weakref.ref[memoryview] | None = None
    """What a tensor in ``memory`` holds as long as it, a view of it or an array on it is alive."""

    def is_free(self) -> bool:
        return not (self.lease and self.lease())


class _Spare(threading.local):
    def __init__(self) -> None:
        self.pieces = [_Piece() for _ in range(_PIECES)]
        self.recomputing = False


_spare = _Spare()


def empty_like(x: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    """:func:`torch.empty_like`, contiguous or in channels_last.

    On a CPU it may lie in memory that the thread keeps for this, at most four pieces of 64 MiB, and that
    nothing else uses. Not for what is kept for a backward pass, which keeps that memory too.
    """
    size = x.nbytes
    kept = x.is_cpu and type(x) is Tensor and _LEAST <= size <= _MOST
    piece = next(filter(_Piece.is_free, _spare.pieces), None) if kept else None
    if piece is None:
        return torch.empty_like(x, memory_format=memory_format)
    if piece.memory is None or piece.memory.nbytes < size:
        piece.memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy().data
    lease = piece.memory[:size]
    piece.lease = weakref.ref(lease)
    # no view: what follows may change it in place
    return torch.frombuffer(lease, dtype=x.dtype).resize_(x.shape, memory_format=memory_format)


def result_like(x: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    """For a result with a gradient: :func:`empty_like` while :func:`recomputing`, else PyTorch's."""
    return (empty_like if _spare.recomputing else torch.empty_like)(x, memory_format=memory_format)


@contextmanager
def recomputing() -> Iterator[None]:
    """While entered, results with a gradient are for a moment too: a backward pass is about to use them."""
    before, _spare.recomputing = _spare.recomputing, True
    try:
        yield
    finally:
        _spare.recomputing = before

"""Memory for short-lived results, reused as soon as nothing refers to the previous one.

A module's output is needed until the next layer has read it, and what a backward pass recomputes until that
pass has used it. The allocator often serves such requests with fresh memory, and the page faults of its first
use cost more time than the module's computation.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LEAST, _MOST = 1 << 20, 64 << 20  # bytes; less is cheap anyway, more is not kept
_PIECES = 4  # a shifted input, a result, a block of its gate; in a backward pass also a gradient


class _Piece:
    """Kept memory."""

    memory: memoryview | None = None
    lease: weakref.ref[memoryview] | None = None
    """Alive as long as any tensor, view or array uses ``memory``."""

    def is_free(self) -> bool:
        return not (self.lease and self.lease())


class _Spare(threading.local):
    def __init__(self) -> None:
        self.pieces = [_Piece() for _ in range(_PIECES)]
        self.saves = True


_spare = _Spare()


def empty_like(x: Tensor, *, memory_format: torch.memory_format) -> Tensor:
    """:func:`torch.empty_like`, contiguous or in channels_last.

    On a CPU it may use memory that the thread keeps for this purpose, at most four pieces of 64 MiB, and that
    nothing else uses. Not for tensors saved for a backward pass, which would keep that memory occupied.
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
    """For results with a gradient: :func:`empty_like` where they are :func:`not_saved`, else PyTorch's."""
    return (torch.empty_like if _spare.saves else empty_like)(x, memory_format=memory_format)


@contextmanager
def not_saved() -> Iterator[None]:
    """A context in which results with a gradient are short-lived too: a backward pass recomputes them."""
    before, _spare.saves = _spare.saves, False
    try:
        yield
    finally:
        _spare.saves = before

"""The frames before this one, where a network works on one frame at a time.

A causal module asks for the past of a tensor (:meth:`~temporal_excite.modules.TemporalModule.past`). On a
whole clip that is the tensor moved in time; in a step of a stream it comes from the stream's state, and the
present goes there. So both are the same lines of code.
"""

import threading
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from .ops import in_graph


class Step:
    """One frame of each stream; while entered, :func:`current` in this thread.

    Args:
        names: of each module that may ask for a past.
        state: what the step before left; a key that it lacks starts at zero where ``blank``.
        copied: keys of tensors that the network changes in place later in the step.
        blank: whether ``state`` may lack keys.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        state: Mapping[str, Tensor],
        copied: frozenset[str] = frozenset(),
        blank: bool = False,
    ) -> None:
        self.names = names
        self.state = state
        self.copied = copied
        self.blank = blank
        self.left: dict[str, Tensor] = {}
        """What this step leaves to the next."""
        self.first = state["frames"].view(-1, 1, 1, 1) == 0
        """Which streams are at their first frame, ``(B, 1, 1, 1)``."""
        self._before: Step | None = None

    def past(self, module: nn.Module, x: Tensor, steps: int, name: str) -> list[Tensor]:
        """``x`` of 1 to ``steps`` frames ago, and ``x`` itself into what the step leaves."""
        prefix = f"{self.names[module]}.{name}."
        if prefix + "1" in self.left:
            raise RuntimeError(
                f"{self.names[module]} ran twice in one step: each site needs a module of its own"
            )
        past: list[Tensor] = []
        for k in range(1, steps + 1):
            key = f"{prefix}{k}"
            self.left[key] = past[-1] if past else self._kept(key, x)
            past.append(self._state(key, x))
        return past

    def _state(self, key: str, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.blank and key not in self.state else self.state[key]

    def _kept(self, key: str, x: Tensor) -> Tensor:
        """``x``, without the memory around it where it is a part of a larger tensor."""
        if key in self.copied:
            return x.clone()
        if not in_graph() and x.untyped_storage().nbytes() > x.numel() * x.element_size():
            return x.clone()
        return x

    def __enter__(self) -> "Step":
        self._before, _local.step = _local.step, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        _local.step = self._before


class _Local(threading.local):
    step: Step | None = None


_local = _Local()


def current() -> Step | None:
    """The step this thread is in, or None: modules are on whole clips."""
    return _local.step

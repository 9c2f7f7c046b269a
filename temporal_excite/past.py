"""The frames before this one, where a network works on one frame at a time.

A causal module asks for the past of a tensor (:meth:`~temporal_excite.modules.TemporalModule.past`). On a
whole clip that is the tensor moved in time; in a step of a stream it comes from the stream's state, and the
present goes there. So both are the same lines of code.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops import positive_int, traced

CHANGED = (
    "the modules that ran in this step are not those the state was made for: make a new Stream after inject, "
    "eject or any other change of the network"
)


class Step:
    """One frame of each stream; while entered, :func:`current` in this thread.

    Args:
        names: the name of each module that may ask for its past.
        state: what the previous step left.
        copied: keys of tensors to store and to hand out as copies (see :meth:`changed`).
        blank: a trial run to learn what the modules keep: the past is zero and not in ``state``.
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
        self.first = state["frames"] == 0
        """Which streams are at their first frame, ``(B,)``."""
        self.owners: dict[str, nn.Module] = {}
        """Where ``blank``, the module that each key is of."""
        self._versions: list[tuple[str, Tensor, int | None]] = []
        self._before: Step | None = None

    def check(self, module: Any) -> None:
        """Raise a ``RuntimeError`` unless the network had this module, causal, when the state was made."""
        if module not in self.names or not module.causal:
            raise RuntimeError(CHANGED)

    def past(self, module: nn.Module, x: Tensor, steps: int, name: str) -> list[Tensor]:
        """``x`` of 1 to ``steps`` frames ago; ``x`` itself is stored in :attr:`left`."""
        prefix = f"{self.names[module]}.{name}.".lstrip(".")
        if prefix + "1" in self.left:
            raise RuntimeError(
                f"{self.names[module]} ran twice in one step: each site needs a module of its own"
            )
        past: list[Tensor] = []
        latest = self._kept(prefix + "1", x)
        for k in range(1, steps + 1):
            key = f"{prefix}{k}"
            self.left[key] = latest
            if self.blank:
                self.owners[key] = module
                latest = torch.zeros_like(x)
                self._watch(key, latest)
            else:
                latest = self.state[key]
            past.append(latest.clone() if key in self.copied else latest)
        return past

    def changed(self, frames: Tensor) -> frozenset[str]:
        """After a ``blank`` step, the keys of tensors that must be copied: the network modified them in place
        after they were stored or handed out, or they share memory with the caller's ``frames``."""
        own = frames.untyped_storage().data_ptr()
        return frozenset(
            key
            for key, x, version in self._versions
            if version is None or x._version != version or x.untyped_storage().data_ptr() == own
        )

    def _kept(self, key: str, x: Tensor) -> Tensor:
        """``x``, or a copy: where one is needed, and where ``x`` would keep the memory of a larger tensor."""
        if self.blank:
            self._watch(key, x)
        if key in self.copied:
            return x.clone()
        if not traced() and x.untyped_storage().nbytes() > x.numel() * x.element_size():
            return x.clone()
        return x

    def _watch(self, key: str, x: Tensor) -> None:
        self._versions.append((key, x, None if x.is_inference() else x._version))

    def __enter__(self) -> "Step":
        self._before, _local.step = _local.step, self
        return self

    def __exit__(self, *_: object) -> None:
        _local.step = self._before


def rehearse(model: nn.Module, frame: Tensor) -> tuple[Step, Any]:
    """Run a model on one frame ``(1, C, H, W)`` to learn what its modules keep: the step, and the output.

    Raises:
        RuntimeError: the model is in training mode, where running it would change it.
    """
    check_evaluating(model)
    names = {module: name for name, module in model.named_modules()}
    state = {"frames": torch.zeros(1, dtype=torch.int64, device=frame.device)}
    # inference tensors have no versions to tell that they were changed
    with torch.inference_mode(False), torch.no_grad(), Step(names, state, blank=True) as step:
        output = model(frame)
    return step, output


def check_evaluating(model: nn.Module) -> None:
    """Raise a ``RuntimeError`` that names the first module in training mode, if any."""
    for name, module in model.named_modules():
        if module.training:
            which = f"{type(module).__name__} {name!r}" if name else f"the {type(module).__name__}"
            raise RuntimeError(f"{which} is in training mode: call model.eval()")


def blank_frame(model: nn.Module, frame_shape: Sequence[int]) -> Tensor:
    """A black frame ``(1, C, H, W)`` on the model's device and in its dtype."""
    if len(frame_shape) != 3:
        raise ValueError(f"frame_shape must be (3, H, W), got {tuple(frame_shape)}")
    shape = [positive_int("frame_shape", n) for n in frame_shape]
    device, dtype = device_and_dtype(model)
    return torch.zeros(1, *shape, device=device, dtype=dtype)


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model's first parameter."""
    like = next(model.parameters(), None)
    return (torch.device("cpu"), torch.get_default_dtype()) if like is None else (like.device, like.dtype)


class _Local(threading.local):
    step: Step | None = None


_local = _Local()


def current() -> Step | None:
    """The step this thread is in; None while modules work on whole clips."""
    return _local.step

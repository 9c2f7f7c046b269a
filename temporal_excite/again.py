"""Tensors that the backward pass needs and computes again, instead of finding them kept.

A convolution keeps its input for the gradient of its weight. Where a temporal module made that input, this
would be a full-size tensor beside the module's own input, which the network keeps anyway.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from .ops import autocast_dtype


class Again:
    """How to compute ``y`` once more when a backward pass needs it.

    Args:
        y: the tensor.
        compute: gives it again.
    """

    def __init__(self, y: Tensor, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._version = y._version
        self._strides = y.stride()
        self._owed = self._left = 0  # tensors saved as this; of these, not asked for yet
        self._value: Tensor | None = None

    def changed(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """``y`` is now, in place, ``function`` of what it was, and only what it is now has been saved."""
        first = self._compute
        self._compute = lambda: function(first())
        self._version = y._version

    def replaced(self, compute: Callable[[], Tensor]) -> None:
        """``compute`` gives from now on what serves as ``y`` for all it has been saved for."""
        self._compute = compute

    def instead_of(self, y: Tensor) -> AbstractContextManager:
        """While entered, autograd keeps this where it would keep ``y``, whatever the shape.

        Everything else is kept as it is, out of reach of hooks around this: enter it for one operation.
        """
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return nullcontext()
        address, size = y.data_ptr(), y.numel()  # not y, which the hooks would keep

        def pack(saved: Tensor) -> tuple[Any, ...]:
            if saved.data_ptr() != address or saved.numel() != size:
                return saved, saved._version
            self._owed += 1
            return self, saved.shape, saved.stride()

        return saved_tensors_hooks(pack, _unpack)

    @staticmethod
    def of(y: Any) -> "Again | None":
        """How to compute ``y`` again, where that is known and nobody has changed it since."""
        again: Again | None = getattr(y, "again", None)
        return again if again and again._version == y._version else None

    def value(self) -> Tensor:
        """``y``; the same tensor for all that are owed it in one backward pass."""
        if self._value is None:
            value = self._compute()
            if value.stride() != self._strides:  # hooks kept its inputs in another layout
                value = value.new_empty_strided(value.shape, self._strides).copy_(value)
            self._value = value
            self._left = self._owed
        value, self._left = self._value, self._left - 1
        if self._left < 1:
            self._value = None
        return value


def _unpack(packed: tuple[Any, ...]) -> Tensor:
    kept, *rest = packed
    if isinstance(kept, Again):
        return kept.value().as_strided(*rest)
    check_version(kept, rest[0])  # autograd does not look where there are hooks
    saved: Tensor = kept
    return saved


def check_version(x: Tensor, version: int) -> None:
    """Raise autograd's ``RuntimeError`` if ``x`` has been changed since it was at ``version``."""
    if x._version != version:
        raise RuntimeError(
            f"a tensor {tuple(x.shape)} needed for the gradient has been modified by an inplace operation: "
            f"it is at version {x._version}, expected version {version}"
        )


class Input(Tensor):
    """The input of a layer."""

    again: Again | None = None
    """What a convolution or average pooling keeps in its place."""
    rectified: int | None = None
    """At which version a ReLU in place has nothing to do; tensors of inference mode have none but 0."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(kind is not cls for kind in types):  # others have their own ways
            args, kwargs = tree_map_only(Input, lambda x: x.as_subclass(Tensor), (args, kwargs or {}))
            return func(*args, **kwargs)
        first: Any = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.relu and (kwargs or {}).get("inplace") and _is_rectified(first):
                return first.as_subclass(Tensor)
            again = Again.of(first) if func in (F.conv2d, F.avg_pool2d) else None
            with again.instead_of(first) if again else nullcontext():
                return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _is_rectified(x: Any) -> bool:
    return isinstance(x, Input) and x.rectified is not None and x.rectified == version_of(x)


def version_of(x: Tensor) -> int:
    """How often ``x`` has been changed in place; 0 where inference mode does not count."""
    return 0 if x.is_inference() else x._version


def computing(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """``function(x)``, under the autocast of now. Keeps ``x`` until then."""
    node: Any = _Kept.apply(x).grad_fn
    autocast = autocast_of_now(x)

    def compute() -> Tensor:
        with torch.no_grad(), autocast:
            return function(*node.saved_tensors)

    return compute


class _Kept(torch.autograd.Function):
    """A node that keeps ``x`` as any node would: hooks, such as those of activation checkpointing, see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)


def autocast_of_now(x: Tensor) -> AbstractContextManager:
    """The autocast there is now on the device of ``x``, to be entered later."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    dtype = autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=dtype is not None)

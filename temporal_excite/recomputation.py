"""Tensors that the backward pass recomputes instead of having them saved.

A convolution saves its input for the gradient of its weight. Where that input is the output of a temporal
module, this is a second full-size tensor beside the module's own input, which the network saves anyway.
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


class Recomputable:
    """How to recompute ``y`` when a backward pass needs it.

    Args:
        y: the tensor.
        compute: returns the tensor once more.
        source: what ``compute`` asks for the value of another such tensor.
    """

    def __init__(
        self, y: Tensor, compute: Callable[[], Tensor], source: "Recomputable | None" = None
    ) -> None:
        self._compute, self._source = compute, source
        self._version = y._version
        self._strides = y.stride()
        self._owed = self._left = 0  # how often this was saved; how often it is still to be unpacked
        self._value: Tensor | None = None

    def changed(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Note that ``function`` was applied to ``y`` in place; only the new value may have been saved."""
        first = self._compute
        self._compute = lambda: function(first())
        self._version = y._version

    def replaced(self, compute: Callable[[], Tensor]) -> None:
        """From now on ``compute`` returns ``y``, or what can stand in for it wherever it was saved."""
        self._compute, self._source = compute, None

    def instead_of(self, y: Tensor) -> AbstractContextManager:
        """A context in which autograd saves this object wherever it would save ``y``, in any shape.

        Other tensors are saved as they are, unseen by the hooks of enclosing contexts: use it for a single
        operation.
        """
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return nullcontext()
        address, size = y.data_ptr(), y.numel()  # not y, which the hooks would keep

        def pack(saved: Tensor) -> tuple[Any, ...]:
            if saved.data_ptr() != address or saved.numel() != size:
                return saved, saved._version
            self._owe()
            return self, saved.shape, saved.stride()

        return saved_tensors_hooks(pack, _unpack)

    def _owe(self) -> None:
        if self._source and not self._owed:  # asked once for all who ask for this value
            self._source._owe()
        self._owed += 1

    @staticmethod
    def of(y: Any) -> "Recomputable | None":
        """How to recompute ``y``; None where that is unknown or ``y`` has been modified in place since."""
        again: Recomputable | None = getattr(y, "again", None)
        return again if again and again._version == y._version else None

    def value(self) -> Tensor:
        """``y``, computed once in a backward pass and shared by all nodes that saved it."""
        if self._value is None:
            value = self._compute()
            if value.stride() != self._strides:  # saved-tensor hooks returned the inputs in another layout
                value = value.new_empty_strided(value.shape, self._strides).copy_(value)
            self._value = value
            self._left = self._owed
        value, self._left = self._value, self._left - 1
        if self._left < 1:
            self._value = None
        return value


def _unpack(packed: tuple[Any, ...]) -> Tensor:
    kept, *rest = packed
    if isinstance(kept, Recomputable):
        return kept.value().as_strided(*rest)
    check_version(kept, rest[0])  # autograd does not check tensors that hooks packed
    saved: Tensor = kept
    return saved


def check_version(x: Tensor, version: int) -> None:
    """Raise a ``RuntimeError`` like autograd's if ``x`` has been modified in place since ``version``."""
    if x._version != version:
        raise RuntimeError(
            f"a tensor {tuple(x.shape)} needed for the gradient has been modified by an inplace operation: "
            f"it is at version {x._version}, expected version {version}"
        )


class Input(Tensor):
    """The input of a layer, with what is known of how it was computed."""

    again: Recomputable | None = None
    """What a convolution or average pooling saves instead of it."""
    rectified: int | None = None
    """The version (:func:`version_of`) at which nothing is negative: an in-place ReLU then does nothing."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(kind is not cls for kind in types):  # other subclasses decide for themselves
            args, kwargs = tree_map_only(Input, lambda x: x.as_subclass(Tensor), (args, kwargs or {}))
            return func(*args, **kwargs)
        first: Any = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.relu and (kwargs or {}).get("inplace") and _is_rectified(first):
                return first.as_subclass(Tensor)
            again = Recomputable.of(first) if func in (F.conv2d, F.avg_pool2d) else None
            with again.instead_of(first) if again else nullcontext():
                return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _is_rectified(x: Any) -> bool:
    return isinstance(x, Input) and x.rectified is not None and x.rectified == version_of(x)


def version_of(x: Tensor) -> int:
    """How often ``x`` has been modified in place; 0 for inference tensors, which have no such counter."""
    return 0 if x.is_inference() else x._version


def computing(
    function: Callable[[Tensor], Tensor], x: Tensor, source: Recomputable | None = None
) -> Callable[[], Tensor]:
    """A callable that returns, under the present autocast, ``function(x)`` for the ``x`` that ``source``
    recomputes, or else for ``x``, which is saved."""
    node: Any = None if source else _Kept.apply(x if x.requires_grad else x.detach().requires_grad_()).grad_fn
    autocast = _autocast_of_now(x)

    def compute() -> Tensor:
        with torch.no_grad(), autocast:
            return function(source.value() if source else node.saved_tensors[0])

    return compute


class _Kept(torch.autograd.Function):
    """Saves ``x`` as any autograd node would, seen by saved-tensor hooks (activation checkpointing)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)


def _autocast_of_now(x: Tensor) -> AbstractContextManager:
    """The present autocast on the device of ``x``, as a context to enter later."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    dtype = autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=dtype is not None)

"""Running networks for their shapes alone: on the meta device, and without work that keeps a shape."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SAME = {
    f.__name__
    for f in (
        *(torch.sigmoid, torch.tanh, torch.nn.functional.softmax, torch.batch_norm),
        *(F.batch_norm, F.layer_norm, F.group_norm, F.relu, F.relu6, F.silu, F.gelu, F.mish, F.leaky_relu),
        *(F.hardswish, F.hardsigmoid, F.hardtanh, F.dropout, F.normalize, torch.relu),
    )
} | {"relu_", "sigmoid_", "mul_", "add_", "clamp_", "addcmul_", "__iadd__", "__imul__"}
BINARY = {"add", "sub", "mul", "__add__", "__mul__", "__radd__", "__rmul__"}
FILL = {"normal_", "uniform_", "fill_", "zero_", "erfinv_", "copy_"}


class ShapesOnly(TorchFunctionMode):
    """Meta kernels of elementwise operations are slow Python: their result has its input's shape anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if (name in SAME or name in FILL) and args and isinstance(args[0], Tensor):
            return args[0]
        if name in BINARY and all(isinstance(a, Tensor) for a in args[:2]) and _spreads(*args[:2]):
            return args[0]
        if name == "linear" and args[0].shape[-1] == args[1].shape[1]:
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[0])
        if name == "scaled_dot_product_attention" and args[0].shape[-1] == args[1].shape[-1]:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def _spreads(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` broadcasts to the shape of ``a``."""
    return b.ndim <= a.ndim and all(
        n in (1, m) for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False)
    )


def meta_model(name: str, **kwargs: Any) -> nn.Module:
    """A timm model on the meta device, in eval mode."""
    with torch.device("meta"), ShapesOnly():
        return timm.create_model(name, pretrained=False, **kwargs).eval()


def meta_run(model: nn.Module, size: int) -> Any:
    """The output of two frames of ``size x size``."""
    with torch.inference_mode(), ShapesOnly():
        return model(torch.empty(2, 3, size, size, device="meta"))

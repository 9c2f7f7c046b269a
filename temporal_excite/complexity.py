"""Parameters and FLOPs of a network, counted by fvcore, and the papers' efficiency.

One multiply-accumulate is one FLOP. ``docs/complexity.md`` says what each convention counts.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._text import columns
from .injection import sites
from .modules.base import set_fast
from .ops import check_model, countable

CONVENTIONS = ("fvcore", "paper")

_ACTIVATIONS = ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "prelu")
_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
# operators of our code that do no arithmetic and that fvcore does not list as free
_REARRANGING = ("unflatten", "pad", "tensor_split", "le", "masked_fill_")


@dataclass(frozen=True)
class SiteComplexity:
    """What one temporal module adds."""

    block: str
    placement: str
    stage: int | None
    module: str
    channels: int | None
    parameters: int
    flops: int


@dataclass(frozen=True)
class Complexity:
    """What a network costs for one input of ``clip_shape``."""

    convention: str
    clip_shape: tuple[int, ...]
    parameters: int
    flops: int
    operators: dict[str, int]
    """FLOPs by operator; their sum is ``flops``."""
    sites: tuple[SiteComplexity, ...]
    """The temporal modules, in the order of :func:`~temporal_excite.sites`; part of the totals."""
    skipped: dict[str, int]
    """Operators counted as free that do arithmetic, and how often each runs."""

    def __str__(self) -> str:
        lines = [
            f"{self.flops / 1e9:.3f} GFLOPs, {self.parameters / 1e6:.3f} M parameters "
            f"for a clip of {' x '.join(map(str, self.clip_shape))} (convention {self.convention!r})"
        ]
        if self.sites:
            rows: list[tuple[object, ...]] = [
                ("block", "placement", "stage", "module", "channels", "parameters", "FLOPs")
            ]
            for s in self.sites:
                counts = f"{s.parameters:,}", f"{s.flops:,}"
                rows.append((s.block, s.placement, s.stage, s.module, s.channels, *counts))
            lines += columns(rows)
        skipped = ", ".join(f"{name} x{calls}" for name, calls in self.skipped.items())
        return "\n".join([*lines, f"not counted: {skipped or 'nothing'}"])


def count(
    model: nn.Module, clip_shape: Sequence[int], convention: str = "fvcore", *, fast: bool = False
) -> Complexity:
    """Count parameters and FLOPs of a network in eval mode, in total and for each temporal module.

    Runs one forward pass on a copy of the model on the CPU; the model itself is not touched.

    Args:
        model: a network on frames ``(N*T, C, H, W)``, with or without temporal modules, or a
            :class:`~temporal_excite.VideoClassifier`.
        clip_shape: ``(T, C, H, W)`` for one clip or ``(N, T, C, H, W)``; the count is for all of it.
        convention: ``"fvcore"`` counts what fvcore counts by default: convolution and matrix product 1 per
            multiply-accumulate, batch norm 2 per element, adaptive average pooling 1 per input element.
            ``"paper"`` is what ACTION-Net's Tables 3 and 5 hold: also 1 per output of a ReLU, 1 per input
            of any pooling, 1 per output for a bias.
        fast: count the modules' fast form (docs/performance.md) instead of the published form, which the
            papers' numbers are of.

    Raises:
        TypeError: ``model`` is not a module, or ``clip_shape`` no sequence.
        ValueError: an unknown convention, a wrong clip shape, a T that differs from the model's
            ``n_segment``, or a shape the model does not take.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    return count_all(model, clip_shape, fast=fast)[convention]


def count_all(model: nn.Module, clip_shape: Sequence[int], *, fast: bool = False) -> dict[str, Complexity]:
    """:func:`count` by every convention, from one forward pass."""
    check_model(model)
    model = getattr(model, "_orig_mod", model)
    shape = _clip_shape(clip_shape)
    segments = {n for m in model.modules() if isinstance(n := getattr(m, "n_segment", None), int)}
    if segments - {shape[-4]}:
        known = ", ".join(map(str, sorted(segments)))
        fix = f"call set_n_segment(model, {shape[-4]}) first" if sites(model) else f"count clips of {known}"
        raise ValueError(
            f"clip_shape {shape} holds clips of {shape[-4]} frames, the model's n_segment is {known}: {fix}"
        )
    by_module, paper_only, unknown = _trace(model, (math.prod(shape[:-3]), *shape[-3:]), fast)
    parameters = sum(p.numel() for p in model.parameters())
    names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    held = sites(model)
    found = {}
    for convention in CONVENTIONS:
        free = paper_only if convention == "fvcore" else Counter[str]()
        operators, *per_site = (
            {name: int(n) for name, n in by_module[names[module]].items() if name not in free}
            for module in (model, *(site.module for site in held))
        )
        found[convention] = Complexity(
            convention=convention,
            clip_shape=shape,
            parameters=parameters,
            flops=sum(operators.values()),
            operators=operators,
            sites=tuple(
                SiteComplexity(
                    block=site.block.replace("_orig_mod.", ""),
                    placement=site.placement,
                    stage=site.stage,
                    module=site.kind,
                    channels=site.channels,
                    parameters=site.parameters,
                    flops=sum(counted.values()),
                )
                for site, counted in zip(held, per_site, strict=True)
            ),
            skipped=dict(unknown + free),
        )
    return found


def efficiency(delta_flops: float, delta_top1: float) -> float:
    """``eta = dFLOPs / dTop-1`` (ACTION-Net, Eq. 10): extra FLOPs in percent for one point of Top-1.

    Args:
        delta_flops: added FLOPs in percent of the baseline's.
        delta_top1: gained Top-1 accuracy in percentage points.

    Raises:
        ValueError: ``delta_top1`` is not above 0 (eta is defined for a gain), or a value is not finite.
    """
    if not (math.isfinite(delta_flops) and math.isfinite(delta_top1)):
        raise ValueError(f"both must be finite, got delta_flops={delta_flops}, delta_top1={delta_top1}")
    if delta_top1 <= 0:
        raise ValueError(f"eta is defined for a gain in Top-1 only, got delta_top1={delta_top1}")
    return delta_flops / delta_top1


def _clip_shape(clip_shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(clip_shape, Iterable):
        raise TypeError(f"clip_shape must be (T, C, H, W) or (N, T, C, H, W), got {clip_shape!r}")
    shape = tuple(clip_shape)
    if len(shape) not in (4, 5) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(
            f"clip_shape must be (T, C, H, W) or (N, T, C, H, W), whole numbers of at least 1, got {shape}"
        )
    return shape


def _trace(
    model: nn.Module, frames: tuple[int, ...], fast: bool
) -> tuple[dict[str, Counter[str]], Counter[str], Counter[str]]:
    """(counts by module and operator in the paper's convention, calls of the operators that are in that
    convention alone, calls of operators without a cost in either)."""
    paper_only: Counter[str] = Counter()
    with warnings.catch_warnings():
        # fvcore lives on torch.jit, and torch announces the end of torch.jit on each use.
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        inputs = torch.zeros(frames, dtype=torch.float32, device="cpu")
        analysis = FlopCountAnalysis(_twin(model, fast), inputs)
        analysis.set_op_handle(**_handles(paper_only))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        try:
            with torch.no_grad(), countable():
                counts = analysis.by_module_and_operator()
        except Exception as error:
            raise ValueError(f"{type(model).__name__} fails on frames of shape {frames}: {error}") from error
    unknown = Counter({name.removeprefix("aten::"): n for name, n in analysis.unsupported_ops().items()})
    return counts, paper_only, unknown


def _twin(model: nn.Module, fast: bool) -> nn.Module:
    """A copy to trace: eval mode, on the CPU in float32, since a trace needs memory and every operator."""
    twin = set_fast(copy.deepcopy(model).eval(), fast)
    for parent in list(twin.modules()):  # torch.compile's wrappers cannot be traced
        for name, child in parent.named_children():
            if hasattr(child, "_orig_mod"):
                setattr(parent, name, child._orig_mod)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
    return twin.to("cpu", torch.float32)


def _handles(paper_only: Counter[str]) -> dict[str, Callable[[Any, Any], Any] | None]:
    """fvcore handles of the paper's convention. Names of what fvcore leaves out, and calls, are noted in
    ``paper_only``."""
    from fvcore.nn.jit_handles import conv_flop_jit, elementwise_flop_counter, get_shape, linear_flop_jit

    def also(handle: Callable[[Any, Any], int], name: str) -> Callable[[Any, Any], Counter[str]]:
        def count(inputs: Any, outputs: Any) -> Counter[str]:
            paper_only[name] += 1
            return Counter({name: handle(inputs, outputs)})

        return count

    def with_bias(handle: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Counter[str]]:
        def count(inputs: Any, outputs: Any) -> Counter[str]:
            cost = handle(inputs, outputs)
            counts = Counter(cost if isinstance(cost, Counter) else {name: cost})
            if get_shape(inputs[2]) is not None:
                paper_only["bias"] += 1
                counts["bias"] = math.prod(get_shape(outputs[0]))
            return counts

        return count

    handles: dict[str, Callable[[Any, Any], Any] | None] = {
        "aten::_convolution": with_bias(conv_flop_jit, "conv"),
        "aten::linear": with_bias(linear_flop_jit, "linear"),
    }
    for name in _ACTIVATIONS:
        handles[f"aten::{name}"] = handles[f"aten::{name}_"] = also(elementwise_flop_counter(0, 1), name)
    for name in _POOLS:
        handles[f"aten::{name}"] = also(elementwise_flop_counter(1, 0), name)
    handles.update({f"aten::{name}": None for name in _REARRANGING})
    return handles

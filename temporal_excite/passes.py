"""Passes over full-size tensors, arranged for memory traffic.

Each function has the value, and the gradient, of the plain line its docstring gives. In eager mode it blocks
its loops so that intermediate results stay in cache, and saves only its inputs for backward, or how to
recompute them (:func:`excite` its result instead); a graph (``torch.compile``, ``torch.export``, tracing)
gets the plain line, which a compiler fuses by itself, and so does a transformation of single operations
(``torch.func``).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import memory, ops
from .ops import following, has_hooks, previous, read_as_called, to_clips, traced
from .recomputation import Input, Recomputable, check_version, computing, version_of

# bytes a pass works on at a time: smaller ones cost more calls than they spare traffic beyond the cache
_BLOCK = 4 << 20
_LINE = 2048  # elements of a line in channels_last
# bytes of a result that may be fresh memory; in larger ones page faults cost more than copying from cache
_FRESH = 8 << 20
_PART = 1 << 20  # bytes of a result made of rows at a time


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For products in a backward pass, which autocast would round where ``backward()`` is called in it."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with ops.full_precision(grad):
            return backward(ctx, grad, *grads)

    return run


def as_recomputable(x: Tensor, y: Tensor, module: nn.Module) -> Tensor:
    """``y = module(x)``, of a temporal module, as the input of the next layer, whose convolution then saves
    how to recompute ``y`` instead of ``y``. Where that is not known, ``y`` itself; also where the module has
    hooks: the next layer's backward pass runs first, when weights that they lend (FSDP) may not be back."""
    if not has_hooks(module) and (again := _again(x, y)):
        given = y.as_subclass(Input)
        given.again = again
        return given
    return y


def note_output(x: Tensor, y: Tensor) -> Tensor:
    """``y``, computed from ``x`` by a function of this file, with a note how to recompute it, which
    :func:`without_saving` then saves instead."""
    if again := _again(x, y):
        y.again = again  # type: ignore[attr-defined]
    return y


def _again(x: Tensor, y: Tensor) -> Recomputable | None:
    """How to recompute ``y``, computed from ``x``; None where that is not known."""
    if traced() or not (needs_grad(y) and _is_real(y)):
        return None
    node: Any = y.grad_fn
    if getattr(node, "version", None) != y._version:  # a hook has changed it, unseen by autograd
        return None
    source = node.source and node.source()
    if source or (node.input and node.input == _identity(x)):
        return Recomputable(y, computing(node.again, x, source), source)
    return None


def _noted(x: Tensor, y: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """``y = again(x)``; its node then holds what :func:`_again` asks for."""
    node: Any = y.grad_fn
    node.version, node.again = y._version, again
    source = Recomputable.of(x)
    # weakly: it keeps what it computes from, and a node can outlive what its backward pass frees
    node.source, node.input = source and weakref.ref(source), _identity(x)
    return y


def _identity(x: Tensor) -> tuple[Any, ...] | None:
    """Equal for tensors of the same values; None without data."""
    if type(x) not in (Tensor, Input) or x.is_meta:
        return None
    return x.data_ptr(), version_of(x), x.shape, x.stride()


def note_norm_output(norm: nn.Module, x: Tensor, y: Tensor) -> None:
    """Let :func:`without_saving` save how to recompute ``y = norm(x)`` instead of ``y``."""
    if traced() or type(norm) is not nn.BatchNorm2d or not (needs_grad(x) and _is_real(y)):
        return
    # but for the hook that asks; and others may have replaced the instance's method
    if len(norm._forward_hooks) == 1 and not norm._forward_pre_hooks and "forward" not in vars(norm):
        y.again = Recomputable(y, computing(_again_by(norm), x))  # type: ignore[attr-defined]


def without_saving(y: Tensor) -> AbstractContextManager:
    """A context, for one operation, in which ``y`` is not saved for backward if it can be recomputed."""
    again = None if traced() else Recomputable.of(y)
    return again.instead_of(y) if again else nullcontext()


class ReLU(nn.ReLU):
    """An in-place ReLU, whose result :func:`without_saving` can recompute if it can recompute its input.

    A result that its hooks may hold has an attribute ``kept``: not to be overwritten.
    """

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if traced():
            return super().forward(x)
        again = Recomputable.of(x)
        with without_saving(x):
            y = super().forward(x)
        if again:
            again.changed(y, torch.relu_)
        if has_hooks(self):
            y.kept = True  # type: ignore[attr-defined]
        return y


def _again_by(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """``norm`` as it is now; its running statistics stay where they are."""
    batch = norm.training or norm.running_mean is None
    statistics = (None, None) if batch else (norm.running_mean, norm.running_var)
    tensors = *statistics, norm.weight, norm.bias
    versions = [(t, t._version) for t in tensors if t is not None]
    eps = norm.eps

    def run(x: Tensor) -> Tensor:
        for tensor, version in versions:
            check_version(tensor, version)
        return F.batch_norm(x, *tensors, batch, eps=eps)

    return run


def temporal_conv(x: Tensor, weight: Tensor, n_segment: int, causal: bool = False) -> Tensor:
    """:func:`~temporal_excite.ops.temporal_conv`:
    ``y[t] = w[:, 0] x[t-1] + w[:, 1] x[t] + w[:, 2] x[t+1]``; causal the same of frames t-2, t-1, t.

    ``weight`` is ``(C, 1, 3)``, or ``(N*T, C, 1, 3)`` where each frame has its own taps.
    """
    if traced() and not causal and weight.ndim == 3:
        return ops.temporal_conv(x, weight, n_segment)
    return _conv_of(x, weight, n_segment, -1 if causal else 0)


def _conv_of(x: Tensor, weight: Tensor, n_segment: int, offset: int) -> Tensor:
    """:func:`temporal_conv`, tap k of frame ``t + k - 1 + offset``."""
    if traced():
        return ops.apply_taps([following(x, n_segment, d) for _, d in _steps(offset)], weight)
    if not needs_grad(x, weight):
        return _temporal_conv(x, weight, n_segment, offset, memory.empty_like)
    version = weight._version

    def convolved(x: Tensor) -> Tensor:
        check_version(weight, version)
        return _temporal_conv(x, weight, n_segment, offset, memory.empty_like)

    with without_saving(x):
        return _noted(x, _TemporalConv.apply(x, weight, n_segment, offset), convolved)


def _temporal_conv(
    x: Tensor, weight: Tensor, n_segment: int, offset: int, empty_like: Callable[..., Tensor]
) -> Tensor:
    weight = weight.to(x.dtype)
    if _is_channels_last(x):
        x = x.contiguous(memory_format=torch.channels_last)  # a slice becomes a copy
        y = empty_like(x, memory_format=torch.channels_last)
        frames, channels, height, width = x.shape
        pixels = _pixels_of_line(height * width, channels)
        shape = frames, height * width // pixels, pixels * channels
        source, target = (t.permute(0, 2, 3, 1).view(shape) for t in (x, y))
        taps = _taps_of_frames(weight, channels).unsqueeze(2).expand(-1, -1, pixels, -1)
        taps = taps.clone(memory_format=torch.contiguous_format).flatten(2).unsqueeze(2)
    else:
        if _in_rows(x):
            return RowConv(x, weight, n_segment, offset).result(empty_like=empty_like)
        y = empty_like(x, memory_format=torch.contiguous_format)
        source, target = x.flatten(2), y.flatten(2)
        taps = _taps_of_frames(weight, x.shape[1]).unsqueeze(3)
    taps = taps.expand(-1, len(x), source.shape[1], -1)
    source, target, *by_tap = (to_clips(t, n_segment) for t in (source, target, *taps))
    terms = [(target, source, by_tap[1 - offset])]
    for k, d in _steps(offset):
        low, high = _meeting(n_segment, d)
        if d and low < high:
            terms.append((target[:, low:high], source[:, low + d : high + d], by_tap[k][:, low:high]))
    step = _per_block(source, 2)
    blocks = (zip(*(t.split(step, 2) for t in term), strict=True) for term in terms)
    for (new, old, tap), *others in zip(*blocks, strict=True):
        torch.mul(old, tap, out=new)
        for new, old, tap in others:
            new.addcmul_(old, tap)
    return y


def _taps_of_frames(weight: Tensor, channels: int) -> Tensor:
    """``(3, 1, C)``, or ``(3, N*T, C)`` where each frame has its own."""
    return weight.reshape(-1, channels, 3).permute(2, 0, 1)


@lru_cache(maxsize=64)
def _pixels_of_line(size: int, channels: int) -> int:
    """How many of ``size`` pixels to multiply at a time: with one the loops would be short, with many the
    repeated taps would not stay in the fastest cache."""
    return _largest_divisor(size, _LINE // channels)


def _in_rows(x: Tensor) -> bool:
    """Whether :class:`RowConv` takes ``x``: where it is fast, and not too many maps, each in one piece."""
    frames, channels, height, width = x.shape
    pitch, *strides = x.stride()
    return (
        ops.has_fast_rows(x)
        and 3 * frames * channels <= 1 << 17
        and strides == [height * width, width, 1]
        and pitch % (height * width) == 0
    )


class RowConv:
    """:func:`_temporal_conv` of maps in one piece: a map of the result is the weighted sum of up to three
    rows of a table. Where ``x`` is contiguous it can be averaged, and gated part by part, before it is
    stored."""

    def __init__(self, x: Tensor, weight: Tensor, n_segment: int, offset: int) -> None:
        frames, channels, height, width = x.shape
        self.x, self.size = x, height * width
        pitch = x.stride(0) // self.size
        self.table = x.as_strided(((frames - 1) * pitch + channels, self.size), (self.size, 1))
        self.options = frames, channels, n_segment, offset, pitch, weight.numel() > 3 * channels
        self.rows, self.starts, taps = _terms(*self.options)
        self.weights = weight.reshape(-1).index_select(0, taps)

    def result(self, *gates: Tensor, empty_like: Callable[..., Tensor] = memory.empty_like) -> Tensor:
        """The convolution, multiplied by the sum of the gates."""
        x = self.x
        if x.nbytes <= _FRESH and not gates:
            sums = ops.sums_of_rows(self.table, self.rows, self.starts, self.weights)
            return sums.resize_(x.shape)  # no view: what follows may change it in place
        y = empty_like(x, memory_format=torch.contiguous_format)
        parts = _parts(max(1, _PART // (4 * self.size)), *self.options)
        weights = self.weights.split([len(rows) for rows, _ in parts.terms])
        targets = y.view(-1, *parts.maps, self.size)
        each = [_by_parts(gate.flatten(2), parts) for gate in gates]
        for (rows, starts), weight, target, *here in zip(parts.terms, weights, targets, *each, strict=True):
            sums = ops.sums_of_rows(self.table, rows, starts, weight).view(target.shape)
            if gates:
                _gate(sums, tuple(here), target)
            else:
                target.copy_(sums)
        return y

    def of_means(self, means: Tensor) -> Tensor:
        """Its means over some positions, given those of ``x``, ``(K, N*T, C)``: these, convolved."""
        means = means.permute(1, 2, 0)
        sums = ops.sums_of_rows(means.flatten(0, 1).contiguous(), self.rows, self.starts, self.weights)
        return sums.view(means.shape).permute(2, 0, 1)

    def channel_mean(self) -> Tensor:
        """Its mean over the channels, ``(N*T, 1, H, W)``."""
        frames, channels, height, width = self.x.shape
        sums = ops.sums_of_rows(self.table, self.rows, self.starts[::channels].contiguous(), self.weights)
        return sums.div_(channels).view(frames, 1, height, width)

    def read(self, means: int, channel_mean: bool) -> "Readings":
        """What :func:`read` gives of the result, but for a squeeze."""
        of_x = read(self.x, None, means, False)[1].means
        of_y = None if of_x is None else self.of_means(of_x)
        return Readings(None, of_y, self.channel_mean() if channel_mean else None)


def row_conv(x: Tensor, weight: Tensor, n_segment: int, causal: bool) -> RowConv | None:
    """:func:`temporal_conv` before it is stored, of contiguous frames, where no gradient is wanted; None
    where it is not computed by rows, or small enough to stay in cache."""
    plain = not (traced() or torch.is_grad_enabled()) and weight.dtype == x.dtype and x.is_contiguous()
    if not plain or x.nbytes <= _FRESH or not _in_rows(x):
        return None
    return RowConv(x, weight, n_segment, -1 if causal else 0)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _terms(
    frames: int, channels: int, n_segment: int, offset: int, pitch: int, framewise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For :class:`RowConv`: the rows of all terms, where those of each map start and end, and their taps."""
    frame = torch.arange(frames, dtype=torch.int32, device="cpu").view(-1, 1, 1)
    channel = torch.arange(channels, dtype=torch.int32, device="cpu").view(-1, 1)
    tap, ahead = torch.tensor(list(_steps(offset)), dtype=torch.int32, device="cpu").T
    meets = frame % n_segment + ahead
    meets = ((meets >= 0) & (meets < n_segment)).expand(-1, channels, -1)
    rows, taps = (frame + ahead) * pitch + channel, channel * 3 + tap
    taps = taps + frame * (3 * channels if framewise else 0)
    ends = meets.sum(2, dtype=torch.int32).flatten().cumsum(0, dtype=torch.int32)
    return rows[meets], F.pad(ends, (1, 0)), taps[meets]


class _Parts(NamedTuple):
    """Equal parts of the maps of a result: whole frames, or so many of a frame's channels."""

    maps: tuple[int, int]
    """Frames and channels of a part."""
    terms: list[tuple[Tensor, Tensor]]
    """For each part the rows of its terms, and where those of each map start and end."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _parts(maps: int, frames: int, channels: int, *options: int) -> _Parts:
    """For :class:`RowConv`: parts of about that many maps."""
    rows, starts, _ = _terms(frames, channels, *options)
    at_once, share = _share(frames, maps // channels), _share(channels, maps)
    terms = []
    for first in range(0, frames * channels, at_once * share):
        of_part = starts[first : first + at_once * share + 1]
        terms.append((rows[of_part[0] : of_part[-1]], of_part - of_part[0]))
    return _Parts((at_once, share), terms)


def _share(number: int, limit: int) -> int:
    """An equal share up to the limit; all of an awkward number, which would fall into too many."""
    share = _largest_divisor(number, limit)
    return number if 4 * share < min(number, limit) else share


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor up to the limit, at least 1."""
    return max(k for k in range(1, max(1, min(number, limit)) + 1) if number % k == 0)


def _by_parts(gate: Tensor, parts: _Parts) -> list[Tensor]:
    """What each part of the maps is multiplied with, of a gate ``(N*T, C, 1)`` or ``(N*T, 1, H*W)``."""
    frames, channels = parts.maps
    if gate.shape[1] > 1:
        return list(gate.view(-1, frames, channels, gate.shape[2]))
    of_frames = gate.view(-1, frames, 1, gate.shape[2])
    return [part for part in of_frames for _ in range(len(parts.terms) // len(of_frames))]


class _TemporalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, n_segment: int, offset: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = n_segment, offset
        return _temporal_conv(x, weight, n_segment, offset, memory.result_like)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        n_segment, offset = ctx.options
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # the adjoint convolution
            grad_x = _conv_of(grad, _adjoint(weight, n_segment, offset), n_segment, -offset)
        if ctx.needs_input_grad[1] and not len(x):  # no clips to sum over
            grad_weight = torch.zeros_like(weight)
        elif ctx.needs_input_grad[1]:
            sums = _sums_of_pixels if _is_channels_last(x) else _sums_of_maps
            grad_weight = sums(grad, x, n_segment, offset, framewise=weight.ndim == 4)
            grad_weight = grad_weight.unsqueeze(-2).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _adjoint(weight: Tensor, n_segment: int, offset: int) -> Tensor:
    """The weight of the adjoint convolution: taps in reverse order; where each frame has its own taps, those
    by which it contributed to other frames."""
    if weight.ndim == 3:
        return weight.flip(-1)
    taps = [following(weight[..., k], n_segment, -d) for k, d in _steps(offset)]
    return torch.stack(taps[::-1], -1)


def _steps(offset: int) -> Iterator[tuple[int, int]]:
    """(tap, how many frames ahead of the present it looks)."""
    return ((k, k - 1 + offset) for k in range(3))


def _meeting(n_segment: int, ahead: int) -> tuple[int, int]:
    """The frames [first, last) of a clip whose tap, ``ahead`` frames further on, is inside the clip."""
    return min(n_segment, max(0, -ahead)), max(0, n_segment - max(0, ahead))


def nine_means(x: Tensor) -> Tensor:
    """:func:`~temporal_excite.ops.nine_means`."""
    if not traced() and needs_grad(x):
        result: Tensor = _NineMeans.apply(x)
        return result
    return ops.nine_means(x)


class _NineMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.layout = _layout(x)
        return ops.nine_means(x)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        frames, _, height, width = ctx.shape
        weights = ops.constant(ops.mean_weights, height, width, grad, grad.dtype).expand(frames, -1, -1)
        if ctx.layout is torch.channels_last:
            spread = torch.bmm(weights.transpose(1, 2), grad.transpose(0, 1)).transpose(1, 2)
        else:
            spread = torch.bmm(grad.permute(1, 2, 0), weights)
        return spread.to(ctx.dtype).unflatten(2, (height, width))


def gate(y: Tensor, *gates: Tensor, reuse: bool = False) -> Tensor:
    """``y * sum(gates)`` with one gate, ``(N*T, C, 1, 1)`` or ``(N*T, 1, H, W)``, or one of each.

    ``reuse`` allows the result in the memory of ``y`` where no gradient is needed.
    """
    if traced():
        return y * sum(gates[1:], gates[0]).to(y.dtype)
    if needs_grad(y, *gates):
        with without_saving(y):
            return _noted(y, _Gate.apply(y, *gates), lambda y: gate(y, *gates))
    in_order = _is_channels_last(y) or y.is_contiguous()
    return _gate(y, gates, y if reuse and in_order else memory.empty_like(y, memory_format=_layout(y)))


def _gate(y: Tensor, gates: tuple[Tensor, ...], out: Tensor) -> Tensor:
    if len(gates) == 1:
        return torch.mul(y, gates[0].to(y.dtype), out=out)
    if y.nbytes <= _BLOCK or y.device.type != "cpu":
        total = memory.empty_like(y, memory_format=_layout(y))
        return torch.mul(y, torch.add(*gates, out=total), out=out)
    in_order = [t.permute(0, 2, 3, 1) for t in (y, out, *gates)] if _is_channels_last(y) else [y, out, *gates]
    source, *others = map(_by_threads, in_order)
    step = _per_block(source, 1)
    both = memory.empty_like(source[:, :step], memory_format=torch.contiguous_format)
    for old, new, *terms in zip(*(t.split(step, 1) for t in (source, *others)), strict=True):
        torch.mul(old, torch.add(*terms, out=both[:, : old.shape[1]]), out=new)
    return out


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *gates: Tensor) -> Tensor:
        ctx.save_for_backward(y, *gates)
        return _gate(y, gates, memory.result_like(y, memory_format=_layout(y)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        y, *gates = ctx.saved_tensors
        return _gate_backward(grad, y, gates)


def _gate_backward(grad: Tensor, y: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``grad * sum(gates)``; and ``grad * y``, summed over what each gate is broadcast over."""
    dims = [[d for d in (-3, -2, -1) if g.shape[d] == 1] for g in gates]
    if _out_of_place():
        product = grad * y
        return gate(grad, *gates), *(product.sum(d, keepdim=True) for d in dims)
    result = memory.empty_like(y, memory_format=_layout(y))
    sums = [torch.empty_like(g) for g in gates]
    views = [_by_threads(t) for t in (grad, y, result, *gates, *sums)]
    step = _per_block(views[1], 1)
    spare = torch.empty_like(views[1][:, :step])
    for first, second, new, *others in zip(*(t.split(step, 1) for t in views), strict=True):
        terms, outs = others[: len(gates)], others[len(gates) :]
        here = spare[:, : first.shape[1]]
        torch.mul(first, second, out=here)
        for d, out in zip(dims, outs, strict=True):
            torch.sum(here, d, keepdim=True, dtype=out.dtype, out=out)
        torch.mul(first, torch.add(*terms, out=here) if len(terms) > 1 else terms[0].to(y.dtype), out=new)
    return result, *sums


class Readings(NamedTuple):
    """What the gates of maps are computed of: tensors, or None where one was not asked for."""

    squeezed: Any
    """A 1x1 convolution of the maps."""
    means: Any
    """The first of their :func:`nine_means`, ``(K, N*T, C)``."""
    channel_mean: Any
    """Their mean over the channels, ``(N*T, 1, H, W)``."""


def read(x: Tensor, conv: nn.Module | None, means: int, channel_mean: bool) -> tuple[Tensor, Readings]:
    """``x`` for the gates to multiply, and what they are computed of: ``conv(x)``, a number of means (0,
    1 or 9), the mean over the channels."""
    if trains_precisely(x, conv):
        weight = None if conv is None else conv.weight
        with without_saving(x):
            same, squeezed, of_maps, of_channels = _Read.apply(x, weight, means, channel_mean)
        same.again = Recomputable.of(x)
        squeezed, of_channels = (
            t if t is None else t.unflatten(2, x.shape[2:]) for t in (squeezed, of_channels)
        )
        return same, Readings(squeezed, of_maps, of_channels)
    squeezed = None if conv is None else squeeze(conv, x)
    with ops.full_precision(x):
        return x, Readings(squeezed, _means(x, means), ops.channel_mean(x) if channel_mean else None)


def squeeze(conv: nn.Module, x: Tensor) -> Tensor:
    """:func:`~temporal_excite.ops.squeeze`."""
    # another layer in its place may save, or change, more than its input
    with without_saving(x) if read_as_called(conv) else nullcontext():
        return ops.squeeze(conv, x)


def _means(x: Tensor, count: int) -> Tensor | None:
    """The first 0, 1 or 9 of the :func:`nine_means`."""
    if not count:
        return None
    return ops.spatial_mean(x)[None] if count == 1 else nine_means(x)


def trains_precisely(x: Tensor, conv: nn.Module | None) -> bool:
    """Whether a gradient is wanted, and ``x`` has the precision of the parameters and of sums. In a lower
    one the products of :func:`read`, and the quotient of :func:`excite`, would round too much."""
    return (
        (conv is None or (read_as_called(conv) and conv.bias is None and conv.weight.dtype == x.dtype))
        and _is_real(x)
        and x.dtype in (torch.float32, torch.float64)
        and ops.autocast_dtype(x.device.type) is None
        and not traced()
        and needs_grad(x, *([] if conv is None else [conv.weight]))
    )


class _Read(torch.autograd.Function):
    """:func:`read`, maps as rows. The gradient of ``x`` comes in one piece, to which one product adds what
    the readings' gradients give."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, means: int, channel_mean: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(weight, None if weight is None else x)
        ctx.shape = x.shape
        rows = [] if weight is None else [weight.flatten(1)]
        if channel_mean:
            rows.append(x.new_full((1, x.shape[1]), 1 / x.shape[1]))
        squeezed = of_channels = None
        if rows:
            maps = torch.bmm(torch.cat(rows).expand(len(x), -1, -1), x.flatten(2))
            # no views, which nobody could change in place
            of_channels = maps[:, -1:].clone() if channel_mean else None
            if weight is not None:
                squeezed = maps[:, :-1].clone() if channel_mean else maps
        return x, squeezed, _means(x, means), of_channels

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad: Tensor, *grads: Any) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        squeezed, of_maps, of_channels = grads
        frames, channels, height, width = ctx.shape
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(squeezed, x.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        terms = []  # what a channel counts for, and a position
        if squeezed is not None:
            terms.append((weight.flatten(1).expand(frames, -1, -1), squeezed))
        if of_maps is not None:
            positions = ops.constant(ops.mean_weights, height, width, grad, grad.dtype)[: len(of_maps)]
            terms.append((of_maps.transpose(0, 1), positions.expand(frames, -1, -1)))
        if of_channels is not None:
            terms.append((grad.new_full((frames, 1, channels), 1 / channels), of_channels))
        each, rows = (torch.cat(parts, 1) for parts in zip(*terms, strict=True))
        return _plus_product(grad, each.transpose(1, 2), rows), grad_weight, None, None


def _plus_product(grad: Tensor, each: Tensor, rows: Tensor) -> Tensor:
    """``grad``, made by the gate's backward pass for this alone, plus a product ``(N*T, C, H*W)``."""
    if _out_of_place():
        return torch.baddbmm(grad.flatten(2), each, rows).view_as(grad)
    grad.flatten(2).baddbmm_(each, rows)
    return grad


def excite(x: Tensor, weight: Tensor, gate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``y = x * gate_of(squeeze(x))``, the squeeze a 1x1 convolution, the gate ``(N*T, C, 1, 1)``.

    Saves ``y`` for backward, as the next layer does anyway, instead of ``x = y / gate``. So the gate must be
    positive and bounded away from zero, and ``x`` the result of a ReLU, whose gradient needs its sign alone.
    """
    ends: list[Tensor] = []
    squeezed, same = _Squeeze.apply(x, weight, ends)
    y: Tensor = _Excite.apply(same, gate_of(squeezed), ends)
    if again := Recomputable.of(x):
        # detached: y's own node leads to the layer that saves this, a reference cycle
        again.replaced(computing(lambda y: y, y.detach()))
    return y


class _Squeeze(torch.autograd.Function):
    """``squeeze(x)`` and ``x``, whose gradient then comes in one piece to add to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: list[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.ends = ends
        return ops.squeeze_by_frame(weight, x), x

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        y, gate = ctx.ends
        ctx.ends.clear()
        grad = grad.flatten(2)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            sums = torch.bmm(grad, y.flatten(2).transpose(1, 2)) / gate.flatten(2).transpose(1, 2)
            grad_weight = sums.sum(0).view_as(weight)
        return _plus_product(grad_x, weight.flatten(1).T.expand(len(y), -1, -1), grad), grad_weight, None


class _Excite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, ends: list[Tensor]) -> Tensor:
        y = _gate(x, (gate,), torch.empty_like(x, memory_format=_layout(x)))
        ctx.save_for_backward(y, gate)
        ctx.ends = ends
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, factor = ctx.saved_tensors
        # attached to their nodes they would be a reference cycle if the squeeze's backward never runs
        ctx.ends[:] = (y, factor) if torch.is_grad_enabled() else (y.detach(), factor.detach())
        grad_x, sums = _gate_backward(grad, y, [factor])
        return grad_x, sums / factor, None


def rectified(y: Tensor) -> Tensor:
    """``y``, nowhere negative, marked so that the in-place ReLU that must follow it does nothing."""
    if traced() or not _is_real(y):
        return y
    given = y.as_subclass(Input)
    given.rectified = version_of(given)
    return given


def part_shift(x: Tensor, ahead: int, behind: int, n_segment: int, reverse: bool = False) -> Tensor:
    """Channels ``[0, ahead)`` from the next frame, ``behind`` more from the previous, zeros at the ends;
    ``reverse`` the other way round."""
    if traced():
        first, second = (previous, following) if reverse else (following, previous)
        channel = torch.arange(x.shape[1], device=x.device).view(-1, 1, 1)
        moved = torch.where(channel < ahead + behind, second(x, n_segment), x)
        return torch.where(channel < ahead, first(x, n_segment), moved) if ahead else moved

    def shifted(x: Tensor) -> Tensor:
        return _part_shift(x, ahead, behind, n_segment, reverse, memory.empty_like)

    if not needs_grad(x):
        return shifted(x)
    return _noted(x, _PartShift.apply(x, ahead, behind, n_segment, reverse), shifted)


def _part_shift(
    x: Tensor, ahead: int, behind: int, n_segment: int, reverse: bool, empty_like: Callable[..., Tensor]
) -> Tensor:
    y = empty_like(x, memory_format=_layout(x))
    source, target = to_clips(x, n_segment), to_clips(y, n_segment)
    moving = ahead + behind
    to_past, to_future = slice(0, ahead), slice(ahead, moving)
    if reverse:
        to_past, to_future = to_future, to_past
    target[:, :, moving:] = source[:, :, moving:]
    target[:, :-1, to_past] = source[:, 1:, to_past]
    target[:, -1, to_past] = 0
    target[:, 1:, to_future] = source[:, :-1, to_future]
    target[:, 0, to_future] = 0
    return y


class _PartShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: int, behind: int, n_segment: int, reverse: bool) -> Tensor:
        ctx.options = ahead, behind, n_segment, not reverse
        return _part_shift(x, ahead, behind, n_segment, reverse, torch.empty_like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return part_shift(grad, *ctx.options), None, None, None, None


def _sums_of_maps(grad: Tensor, x: Tensor, n_segment: int, offset: int, framewise: bool) -> Tensor:
    """What a depthwise temporal convolution's weight gets, in float32 at least:
    ``out[t, c, k] = sum_p grad[t, c, p] x[t + d_k, c, p]``, or that summed over t.

    All frames with all frames in one product.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    clips = zip(*(to_clips(t.flatten(2), n_segment) for t in (grad, x)), strict=True)
    products = [torch.bmm(a.to(wide).transpose(0, 1), b.to(wide).permute(1, 2, 0)) for a, b in clips]
    if framewise:
        each, taps = torch.stack(products), []
        for _, d in _steps(offset):
            first, last = _meeting(n_segment, d)
            taps.append(F.pad(each.diagonal(d, 2, 3), (first, n_segment - last)))
        return torch.stack(taps, -1).transpose(1, 2).flatten(0, 1)
    total = sum(products[1:], products[0])
    return total.flatten(1) @ ops.constant(_diagonals, n_segment, offset, total, wide)


def _diagonals(n_segment: int, offset: int) -> list[list[float]]:
    """Which of the products of T frames with T frames each tap is the sum of: ``(T * T, 3)``."""
    frames = range(n_segment)
    return [[float(b - a == d) for _, d in _steps(offset)] for a in frames for b in frames]


def _sums_of_pixels(grad: Tensor, x: Tensor, n_segment: int, offset: int, framewise: bool) -> Tensor:
    """The same in channels_last, where a product would copy the matrix of each channel."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = (to_clips(t.permute(0, 2, 3, 1).flatten(1, 2), n_segment) for t in (grad, x))
    step = _per_block(a, 2)
    taps = []
    for _, d in _steps(offset):
        first, last = _meeting(n_segment, d)
        blocks = zip(a[:, first:last].split(step, 2), b[:, first + d : last + d].split(step, 2), strict=True)
        sums = torch.stack([(g.to(wide) * f).sum(2) for g, f in blocks]).sum(0)
        if framewise:
            sums = F.pad(sums, (0, 0, first, n_segment - last)).flatten(0, 1)
        taps.append(sums if framewise else sums.sum((0, 1)))
    return torch.stack(taps, -1)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _out_of_place() -> bool:
    """Whether a backward pass must use plain operations: the gradient itself is to be differentiated, or the
    backward pass is traced or vectorised."""
    return torch.is_grad_enabled() or traced()


def _is_real(x: Tensor) -> bool:
    """Whether this is a plain tensor with data: no subclass, no meta tensor."""
    return type(x) is Tensor and not x.is_meta


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, also in a slice."""
    return not x.is_contiguous() and x.stride(1) == 1


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _per_block(x: Tensor, dim: int) -> int:
    """How much of a dimension a pass takes at a time: on a CPU what stays in cache, elsewhere all.

    No blocks of single frames: threads would share each, where one operation on all frames gives each thread
    frames of its own. Data in another core's cache is slow to reach, above all to write.
    """
    size = x.shape[dim]
    return max(1, size * _BLOCK // max(1, x.nbytes) if x.device.type == "cpu" else size)


def _by_threads(frames: Tensor) -> Tensor:
    """``(N, ...)`` as ``(threads, N / threads, ...)``."""
    count, *shape = frames.shape
    threads = gcd(count, torch.get_num_threads())
    return frames.view(threads, count // threads, *shape)

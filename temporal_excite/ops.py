"""The tensor functions temporal modules share. Frames come as ``(N*T, C, H, W)``, clip after clip."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HAS_AVX = torch.backends.cpu.get_cpu_capability().startswith("AVX")
_ROWS = 1 << 17  # of a table's rows, to list at a time

_countable = False
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # of make_fx
_FAKE = torch._C._TorchDispatchModeKey.FAKE  # whose tensors, made of nothing, must not be kept


@contextmanager
def countable() -> Iterator[None]:
    """A context in which each function here runs as operators whose cost counters know.

    :func:`~temporal_excite.complexity.count` traces a network under it: a temporal convolution written as
    multiplications and additions would look free to a counter of convolutions. Values are the same.
    """
    global _countable
    before, _countable = _countable, True
    try:
        yield
    finally:
        _countable = before


def traced() -> bool:
    """Whether plain operations are wanted: they are being recorded into a graph, or transformed one by one
    (``torch.func``, forward-mode differentiation)."""
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return compiling or _transformed() or torch._C._get_dispatch_mode(_PROXY) is not None


def _transformed() -> bool:
    # what torch.autograd.Function asks; there is no public name for either
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_compiler() -> bool:
    """Whether the graph is for a compiler, which fuses what it can, and not for export."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def positive_int(name: str, value: int) -> int:
    """``value``, or an error that names it when it is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_model(model: object) -> None:
    """Raise a ``TypeError`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_frames(x: Tensor, n_segment: int, channels: int) -> None:
    """Raise a ``ValueError`` naming the numbers unless ``x`` is ``(N*n_segment, channels, H, W)``."""
    if x.ndim != 4:
        raise ValueError(
            f"expected frames of shape (N*T, C, H, W), got {x.ndim}-D input {tuple(x.shape)}; "
            "flatten clips (N, T, C, H, W) with x.flatten(0, 1)"
        )
    if x.shape[1] != channels:
        raise ValueError(f"module built for {channels} channels got input {tuple(x.shape)}")
    check_whole_clips(x, n_segment)


def check_whole_clips(x: Tensor, n_segment: int) -> None:
    """Raise a ``ValueError`` naming both numbers unless ``x`` holds a multiple of ``n_segment`` frames."""
    if x.shape[0] % n_segment:
        raise ValueError(
            f"{x.shape[0]} frames are not a multiple of n_segment={n_segment}: feed whole clips, "
            f"or call set_n_segment(model, T) for clips of T frames"
        )


def to_clips(x: Tensor, n_segment: int) -> Tensor:
    """View ``(N*T, ...)`` as ``(N, T, ...)``."""
    # the quotient, not -1: an exporter then keeps one symbol for the number of clips
    return x.view(x.shape[0] // n_segment, n_segment, *x.shape[1:])


def previous(frames: Tensor, n_segment: int, steps: int = 1) -> Tensor:
    """Frames moved so that frame t of a clip holds frame t - ``steps``; the first ones are zero."""
    return following(frames, n_segment, -steps)


def following(frames: Tensor, n_segment: int, steps: int = 1) -> Tensor:
    """Frames moved so that frame t of a clip holds frame t + ``steps``; the last ones are zero, or the first
    where ``steps`` is negative."""
    if not steps:
        return frames
    vacant = range(max(0, n_segment - steps), n_segment) if steps > 0 else range(min(-steps, n_segment))
    return _zeroed(_moved(frames, n_segment, -steps), n_segment, vacant)


def step_ahead(later: Tensor, now: Tensor, n_segment: int) -> Tensor:
    """``later[t+1] - now[t]`` at frame t, zero at a clip's last frame."""
    if traced():
        return _zeroed(_moved(later, n_segment, -1) - now, n_segment, [n_segment - 1])
    difference = torch.empty_like(now)
    difference[:-1] = later[1:] - now[:-1]
    return _zeroed(difference, n_segment, [n_segment - 1])


def first_zeroed(frames: Tensor, n_segment: int) -> Tensor:
    """Frames, the first one of each clip zero."""
    return _zeroed(frames.clone(), n_segment, [0])


def _moved(frames: Tensor, n_segment: int, steps: int) -> Tensor:
    """Frame i at i + ``steps``; what arrives from beyond the ends is arbitrary."""
    upper, lower = (slice(k, None) if k > 0 else slice(k) for k in (steps, -steps))
    if traced() and not in_compiler() and abs(steps) > n_segment - 2:
        # with one clip at most one frame moves: a copy would make an exporter ask for the number of clips
        return F.pad(frames, [0, 0] * (frames.ndim - 1) + [max(0, steps), max(0, -steps)])[lower]
    # a compiler fuses this, unlike a concatenation; an empty tensor it would allocate and read
    moved = torch.zeros_like(frames) if traced() else torch.empty_like(frames)
    moved[upper] = frames[lower]
    return moved


def _zeroed(frames: Tensor, n_segment: int, positions: Sequence[int]) -> Tensor:
    """``frames``, zero at some positions of each clip; in place."""
    if not traced():
        for at in positions:
            frames[at::n_segment] = 0
        return frames
    # No view by clips, no slice with a step: with a symbolic batch each round of splitting and joining it
    # would make the expression for it longer, and a slice would ask whether there is but one clip
    position = torch.arange(frames.shape[0], device=frames.device) % n_segment
    vacant = (position >= positions[0]) & (position <= positions[-1])
    return frames.masked_fill_(vacant.view(-1, *[1] * (frames.ndim - 1)), 0)


def sum_taps(before: Tensor, now: Tensor, after: Tensor, n_segment: int) -> Tensor:
    """``y[t] = before[t-1] + now[t] + after[t+1]``, zero beyond the clip's ends; all ``(N*T, ...)``.

    With the three taps of a temporal convolution applied frame by frame this is the convolution.
    """
    return previous(before, n_segment) + now + following(after, n_segment)


def temporal_conv(x: Tensor, weight: Tensor, n_segment: int) -> Tensor:
    """Temporal convolution with kernel 3 and zero padding, depthwise or full.

    ``y[t] = W[..., 0] x[t-1] + W[..., 1] x[t] + W[..., 2] x[t+1]`` at each position.

    Args:
        x: ``(N*T, C, H, W)``.
        weight: ``(C, 1, 3)`` for a depthwise one, ``(C_out, C, 3)`` for a full one.
        n_segment: T.
    """
    weight = weight.to(x.dtype)
    if weight.shape[1] > 1:
        # three 1x1 convolutions in one; moving their outputs in time spares copies of the input
        taps = F.conv2d(x, weight.permute(2, 0, 1).flatten(0, 1)[..., None, None])
        before, now, after = taps.chunk(3, dim=1)
        return sum_taps(before, now, after, n_segment)
    if _countable:
        clips = to_clips(x.flatten(2), n_segment).transpose(1, 2)  # (N, C, T, H*W)
        y = F.conv2d(clips, weight.unsqueeze(-1), padding=(1, 0), groups=x.shape[1])
        return y.transpose(1, 2).reshape(x.shape)
    before, now, after = _taps(weight, x)
    return sum_taps(x * before, x * now, x * after, n_segment)


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """``(C, 1, 3)`` or ``(N*T, C, 1, 3)`` as ``(3, 1 or N*T, C, 1, 1)``, to be multiplied with ``x``."""
    taps = weight.reshape(-1, 3).T
    if traced() and x.device.type == "cpu" and not (in_compiler() and len(x) == 1 and x.numel() <= 1 << 17):
        # A product is contiguous and computed once. Without it the compiler's inner loop would gather the
        # taps from a view and recompute what they are made of, element by element: cheaper if it is short
        with full_precision(weight):
            taps = torch.eye(3, dtype=weight.dtype, device=weight.device) @ taps
    return taps.unflatten(1, (-1, x.shape[1]))[..., None, None]


def apply_taps(frames: list[Tensor], weight: Tensor) -> Tensor:
    """``y = W[..., 0] frames[0] + W[..., 1] frames[1] + W[..., 2] frames[2]``: a temporal convolution, given
    the frame for each tap.

    Args:
        frames: the three, each ``(N*T, C, H, W)``, or ``(N*T, C)`` for a full convolution.
        weight: as for :func:`temporal_conv`; or ``(N*T, C, 1, 3)``, depthwise and its own for each frame.
    """
    first, second, third = frames
    weight = weight.to(third.dtype)
    if third.ndim == 2:
        return linear(torch.stack(frames, 2).flatten(1), weight.flatten(1))
    if weight.ndim == 3 and weight.shape[1] == third.shape[1]:
        return F.conv2d(torch.cat(frames, 1), weight.transpose(1, 2).flatten(1)[..., None, None])
    if _countable:
        groups = torch.stack(frames, 2).flatten(0, 2)  # (N*T * C * 3, H, W)
        kernel = weight if weight.ndim == 4 else weight.repeat(len(third), 1, 1)
        kernel = kernel.reshape(-1, 3, 1, 1)
        return F.conv2d(groups[None], kernel, groups=len(kernel)).view(third.shape)
    one, two, three = _taps(weight, third)
    if traced():  # transformations know no addcmul_
        return first * one + second * two + third * three
    return (third * three).addcmul_(first, one).addcmul_(second, two)


def at_each_frame(function: Callable[[Tensor], Tensor], frames: Tensor, n_segment: int) -> Tensor:
    """``(N*T, C)`` to ``(N*T, ...)``: what ``function``, ``(N, C, T)`` to ``(N, ...)``, makes of the clip."""
    if traced() and not _countable:  # a view by clips would ask an exporter whether there is but one
        frame = torch.arange(frames.shape[0], device=frames.device)
        first = frame - frame % n_segment
        clips = frames[first[:, None] + torch.arange(n_segment, device=frames.device)]
        return function(clips.transpose(1, 2))
    return function(to_clips(frames, n_segment).transpose(1, 2)).repeat_interleave(n_segment, 0)


# The nine parts of a map: (rows, columns), 0 all of them, 1 the first, 2 the last
_PARTS = [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]


def nine_means(x: Tensor) -> Tensor:
    """Of maps ``(N, C, H, W)`` what the mean of any zero-padded 3x3 convolution depends on: ``(9, N, C)``.

    The means over everything, the first row, the last row, the first column, the last column, and the corners
    first-first, first-last, last-first, last-last (row-column). In float32 at least; to be called without
    autocast. See :func:`coefficients`.
    """
    if _countable:
        return torch.stack([spatial_mean(part) for part in nine_parts(x)])
    height, width = x.shape[2:]
    kind = torch.promote_types(x.dtype, torch.float32)
    if has_fast_rows(x):
        by_rows = None
        if x.is_contiguous() and width >= 8:  # of short rows the sums take longer than what follows
            by_rows, rows = _nine_means_of_maps, x.shape[1] * height
        elif x.is_contiguous(memory_format=torch.channels_last) and height * width >= 8:
            by_rows, rows = _nine_means_of_pixels, height * width
        if by_rows:
            found = [by_rows(frames) for frames in x.split(max(1, _ROWS // rows))]
            return torch.cat(found, 1) if len(found) > 1 else found[0]
    if not traced() and x.device.type == "cpu" and _has_short_product(x, kind):
        weights = constant(mean_weights, height, width, x, kind)
        products = torch.bmm(weights.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2).to(kind))
        return products.transpose(0, 1)
    if traced():  # by lines: a compiler's loop over a whole map would leave the cache
        lines = x.mean(3, dtype=kind)
        means = [lines.mean(2), lines[..., 0], lines[..., -1]]
    else:
        means = [spatial_mean(x), *(x[:, :, i].mean(2, dtype=kind) for i in (0, -1))]
    # each by itself: of two columns at once each thread would take one, of all frames
    means += [x[..., j].mean(2, dtype=kind) for j in (0, -1)]
    return torch.stack(means + [x[:, :, i, j] for i in (0, -1) for j in (0, -1)])


def sums_of_rows(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_k weights[k] table[rows[k]]`` over each of the stretches of k that begin at ``starts``, which
    ends with the number of k: one pass, in which PyTorch gathers, weighs and adds."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights, True)[0]


def has_fast_rows(x: Tensor) -> bool:
    """Whether :func:`sums_of_rows` is fast for ``x``: float32 on an x86 CPU."""
    plain = type(x) is Tensor and x.is_cpu and not traced() and torch._C._get_dispatch_mode(_FAKE) is None
    return _HAS_AVX and plain and x.dtype == torch.float32 and x.numel() > 0


def _nine_means_of_maps(x: Tensor) -> Tensor:
    """:func:`nine_means` of contiguous maps: of each the sum of all rows, the first row and the last; of
    these the sums of their elements, the first elements and the last."""
    count, channels, height, width = x.shape
    sums = sums_of_rows(x.view(-1, width), *_rows_of_maps(count * channels, height))
    sums = sums.view(count, channels, 3, width)
    sums = torch.cat((sums.sum(3), sums[..., :: width - 1].flatten(2)), 2)
    return (sums / constant(_part_sizes, height, width, x, x.dtype)).permute(2, 0, 1)


def _nine_means_of_pixels(x: Tensor) -> Tensor:
    """:func:`nine_means` in channels_last, where the channels of a pixel are a row: the sum of each line of
    pixels, since one long sum would round too often, and of each other part."""
    count, channels, height, width = x.shape
    sums = sums_of_rows(x.permute(0, 2, 3, 1).view(-1, channels), *_pixels_of_parts(count, height, width))
    lines, others = sums.view(count, -1, channels).split((height, 6), 1)
    sums = torch.cat((lines.sum(1, keepdim=True), lines[:, :1], lines[:, -1:], others), 1)
    return (sums / constant(_part_sizes, height, width, x, x.dtype).T).transpose(0, 1)


def _part_sizes(height: int, width: int) -> list[list[float]]:
    """How many positions each of the nine parts of a map has, as one row."""
    return [[(1 if i else height) * (1 if j else width) for i, j in _PARTS]]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _rows_of_maps(count: int, height: int) -> tuple[Tensor, Tensor]:
    """All rows of a map, the first and the last, for each map; and where these begin and end."""
    rows = torch.arange(height, dtype=torch.int32, device="cpu")
    return _repeated([rows, rows[:1], rows[-1:]], count)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _pixels_of_parts(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The pixels of each line of a map, of its outer columns and its corners, for each map; and where these
    begin and end."""
    pixels = torch.arange(height * width, dtype=torch.int32, device="cpu").view(1, 1, height, width)
    others = [part.flatten() for part in nine_parts(pixels)[3:]]
    return _repeated([*pixels[0, 0], *others], count)


def _repeated(parts: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Parts of a map's rows, which hold them all, for each map; and where these begin and end."""
    each = torch.arange(count, dtype=torch.int32, device="cpu").unsqueeze(1)
    of_map = torch.cat(parts)
    rows = each * (of_map.max() + 1) + of_map
    ends = torch.tensor([len(part) for part in parts] * count, device="cpu").cumsum(0, dtype=torch.int32)
    return rows.flatten(), F.pad(ends, (1, 0))


def _has_short_product(x: Tensor, kind: torch.dtype) -> bool:
    """Whether a matrix product for each frame gives its nine means in less time than gathering the edges."""
    size = x.shape[2] * x.shape[3]
    by_frame = x.dtype == kind and x.is_contiguous() and size <= 1 << 9
    return by_frame or (x.numel() <= 1 << 20 and size <= 1 << 12)


def mean_weights(height: int, width: int) -> list[list[float]]:
    """What each position of a map counts for in each of the :func:`nine_means`."""
    rows, columns = ([[1 / n] * n, [1.0] + [0.0] * (n - 1), [0.0] * (n - 1) + [1.0]] for n in (height, width))
    return [[r * c for r in rows[i] for c in columns[j]] for i, j in _PARTS]


def nine_parts(x: Tensor) -> list[Tensor]:
    """The views of ``x`` that :func:`nine_means` takes the means of."""
    which = slice(None), slice(1), slice(-1, None)
    return [x[:, :, which[i], which[j]] for i, j in _PARTS]


def coefficients(kernel: Tensor, height: int, width: int) -> Tensor:
    """``(C, 1, 3, 3)`` to ``(9, C)``: ``mean(kernel * x) = (coefficients * nine_means(x)).sum(0)``, exactly.

    ``kernel * x`` is the depthwise convolution, zero-padded. Its tap ``(ky, kx)`` meets every position but
    the last row where ``ky = 0``, the first row where ``ky = 2``, columns likewise. So everything counts as
    often as the kernel has weight, an outer row or column is taken off again with the weight of the taps
    that miss it, and a corner given back where that took it off twice.
    """
    if traced():  # the sizes may be symbols, which no constant can hold
        signs = constant(_tap_weights, 1, 1, kernel, kernel.dtype)
        whole, rows, columns, corners = linear(signs, kernel.flatten(1)).split((1, 2, 2, 4))
        return torch.cat((whole, rows / height, columns / width, corners / (height * width)))
    return linear(constant(_tap_weights, height, width, kernel, kernel.dtype), kernel.flatten(1))


def _tap_weights(height: int, width: int) -> list[list[float]]:
    """What each tap of a kernel counts for in each of the :func:`coefficients`."""
    taps = (1, 1, 1), (0, 0, -1), (-1, 0, 0)  # of a line, that everything, the first, the last counts for
    (sizes,) = _part_sizes(height, width)
    shares = [size / (height * width) for size in sizes]
    return [
        [s * ky * kx for ky in taps[i] for kx in taps[j]] for s, (i, j) in zip(shares, _PARTS, strict=True)
    ]


_constants: dict[tuple[Any, ...], Tensor] = {}


def constant(
    rows: Callable[[int, int], list[list[float]]], first: int, second: int, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """``rows(first, second)`` on the device of ``like``, made once; not to be changed."""
    key = rows, first, second, dtype, like.device
    real = type(like) in (Tensor, nn.Parameter) and not traced()  # no stand-in of a tracer
    if real and (kept := _constants.get(key)) is not None:
        return kept
    with torch.inference_mode(False):
        found = like.new_tensor(rows(first, second), dtype=dtype)
    if real and type(found) is Tensor:
        if len(_constants) >= 64:  # clips of many sizes
            _constants.clear()
        _constants[key] = found
    return found


def spatial_mean(x: Tensor) -> Tensor:
    """``x.mean((2, 3))`` of ``(N, C, H, W)``, in float32 at least."""
    if _countable:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
    return _mean(x, (2, 3), x.shape[2] * x.shape[3])


def channel_mean(x: Tensor) -> Tensor:
    """``x.mean(1, keepdim=True)``, in float32 at least."""
    large = x.is_cpu and x.dtype == torch.float32 and x.shape[2] * x.shape[3] >= 1 << 10
    if large and x.is_contiguous() and not (traced() or torch.is_grad_enabled()):
        # a product reads large maps faster; its gradient would be one too, where a sum's is a view
        return squeeze_by_frame(x.new_full((1, x.shape[1]), 1 / x.shape[1]), x)
    return _mean(x, (1,), x.shape[1], keepdim=True)


def _mean(x: Tensor, dims: tuple[int, ...], count: int, keepdim: bool = False) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    if traced() or not torch.is_grad_enabled():
        return x.mean(dims, keepdim=keepdim, dtype=kind)
    # divided afterwards: the gradient of a mean is divided at its full size
    return x.sum(dims, keepdim=keepdim, dtype=kind) / count


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its ``forward``; a counter's hooks do not count."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return not _countable and any(map(len, hooks))


def read_as_called(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether computing with a convolution's weight is equivalent to calling the convolution."""
    return type(conv) is nn.Conv2d and not has_hooks(conv)


def weight_of(layer: nn.Module) -> Tensor:
    """``layer.weight`` as in a call, in which PyTorch's pruning and older weight norms first compute it."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
            hook(layer, ())
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def taps_of(conv: nn.Module) -> Tensor:
    """The weight of a temporal convolution that is never called, ``(C_out, C, 3)``."""
    if type(conv) is not nn.Conv1d and not is_parametrized(conv):
        raise TypeError(
            f"{type(conv).__name__} took the place of a temporal convolution, which is never called: only "
            "its weight is used; change that with torch.nn.utils.parametrize"
        )
    return weight_of(conv)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of vectors ``(N, C)``, in its own dtype."""
    if read_as_called(conv):  # a matrix product: setting up a convolution takes longer than this one
        return linear(x.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)
    # quantised, adapted or otherwise replaced
    kind = next((p.dtype for p in conv.parameters() if p.is_floating_point()), x.dtype)
    return conv(x.to(kind)[..., None, None]).flatten(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of vectors ``(N, C)``."""
    if not _written_out(x) or weight.numel() > 1 << 14:
        return F.linear(x, weight, bias)
    y = (x.unsqueeze(1) * weight).sum(2)
    return y if bias is None else y + bias


def conv_to_one(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution of maps ``(N, C, H, W)`` to one channel, zero-padded; for few channels."""
    if not _written_out(x):
        return F.conv2d(x, weight, padding=1)
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    parts = [
        padded[:, :, i : i + height, j : j + width] * weight[:, :, i, j, None, None]
        for i in range(3)
        for j in range(3)
    ]
    return sum(parts[1:], parts[0]).sum(1, keepdim=True)


def _written_out(x: Tensor) -> bool:
    """Whether to write a small product as a sum: a compiler fuses that with the operations around it, which
    takes less time than calling a product or convolution."""
    return in_compiler() and x.device.type == "cpu" and not torch.is_grad_enabled()


def squeeze(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution to few channels of maps ``(N, C, H, W)``.

    On a CPU the gradient of PyTorch's convolution of contiguous maps makes two copies of ``x``; here each
    frame is a matrix product, but not in lower precision, in which its weight's gradient would be rounded for
    each frame.
    """
    by_frame = x.device.type == "cpu" and x.is_contiguous() and not traced() and not _countable
    precise = x.dtype.itemsize > 2 and autocast_dtype(x.device.type) is None
    if not (by_frame and precise) or not read_as_called(conv) or conv.bias is not None:
        return conv(x)
    return squeeze_by_frame(conv.weight, x)


def squeeze_by_frame(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product for each frame."""
    return torch.bmm(weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of the present autocast on devices of type ``kind``; None without autocast."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of ``x``: for operations on pooled values, where rounding would show."""
    kind = x.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)

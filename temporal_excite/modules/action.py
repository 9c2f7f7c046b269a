"""ACTION-Net's modules: STE, CE, ME and their sum.

Wang, She, Smolic: ACTION-Net: Multipath Excitation for Action Recognition, CVPR 2021. The defaults compute
what the authors' released code computes; docs/fidelity.md lists where the text differs.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import memory, passes
from ..ops import (
    apply_taps,
    channel_mean,
    coefficients,
    conv_to_one,
    following,
    full_precision,
    has_hooks,
    linear,
    pointwise,
    positive_int,
    previous,
    read_as_called,
    spatial_mean,
    step_ahead,
    taps_of,
    to_clips,
    traced,
    weight_of,
)
from .base import TemporalModule
from .registry import register_module
from .tsm import TemporalConv


class Excitation(TemporalModule):
    """A path that excites its input: ``y = x + x * gate(x)`` (Eq. 3), with ``gate`` in (0, 1).

    With ``identity_start`` the last layer before the sigmoid starts at zero and the gate enters centred,
    ``y = x + x * (2 * gate(x) - 1)``: a fresh module returns its input exactly, and both directions,
    excite and suppress, can be learnt.
    """

    def __init__(
        self, channels: int, n_segment: int = 8, *, identity_start: bool = False, causal: bool = False
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        self.identity_start = identity_start

    def gate(self, x: Tensor) -> Tensor:
        """The mask M, broadcastable to ``x``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if not self.fast:
            return x * _combine([self.gate(x)], self.identity_start).to(x.dtype)
        return passes.gate(x, _combine([self.gate(x)], self.identity_start))


class STE(Excitation):
    """Spatio-temporal excitation (Eqs. 1-3): one 3x3x3 convolution on the mean over channels.

    ``M = sigmoid(K * mean_c(x))``, M of shape ``(N*T, 1, H, W)``. ``weight`` holds the kernel K as
    ``(1, 3 taps of time, 3, 3)``, zero padding in time and space, no bias. Causal: the taps of time are
    frames t-2, t-1 and t instead of t-1, t and t+1.

    Args:
        channels: C.
        n_segment: T.
        identity_start: see :class:`Excitation`.
        causal: the causal form.
    """

    def __init__(
        self, channels: int, n_segment: int = 8, *, identity_start: bool = False, causal: bool = False
    ) -> None:
        super().__init__(channels, n_segment, identity_start=identity_start, causal=causal)
        self.weight = nn.Parameter(torch.zeros(1, 3, 3, 3))
        if not identity_start:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def gate(self, x: Tensor) -> Tensor:
        with full_precision(x) if self.fast else nullcontext():
            return self.gate_of_mean(channel_mean(x) if self.fast else x.mean(dim=1, keepdim=True))

    def gate_of_mean(self, mean: Tensor) -> Tensor:
        """The mask for frames whose mean over the channels is ``mean``, ``(N*T, 1, H, W)``; the fast form
        to be called without autocast."""
        weight = weight_of(self).to(mean.dtype)
        # large maps PyTorch convolves faster in two dimensions, and a graph keeps the batch one symbol
        if self.fast and not self.causal and not traced() and mean.shape[2:].numel() < 1 << 10:
            clips = to_clips(mean, self.n_segment).transpose(1, 2)
            return F.conv3d(clips, weight[None], padding=1).sigmoid().view_as(mean)
        return conv_to_one(torch.cat(self.tap_frames(mean, "mean"), dim=1), weight).sigmoid()


class CE(Excitation):
    """Channel excitation (Eqs. 4-8): squeeze-and-excitation with a temporal convolution in between.

    ``M = sigmoid(K3 * relu(K2 * (K1 * mean_hw(x))))``, M of shape ``(N*T, C, 1, 1)``; K1 and K3 are 1x1
    (``squeeze``, ``expand``), K2 (``temporal``) is a full temporal convolution of kernel 3 on the
    ``max(1, C // reduction)`` squeezed channels. The ReLU is the released code's; the text has none.
    Causal: K2's taps are frames t-2, t-1 and t instead of t-1, t and t+1.

    Args:
        channels: C.
        n_segment: T.
        reduction: ratio of the squeeze.
        relu: ``False`` gives the text's form.
        identity_start: see :class:`Excitation`.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        reduction: int = 16,
        *,
        relu: bool = True,
        identity_start: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, identity_start=identity_start, causal=causal)
        squeezed = max(1, channels // positive_int("reduction", reduction))
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.temporal = nn.Conv1d(squeezed, squeezed, 3, padding=1, bias=False)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.expand = nn.Conv2d(squeezed, channels, 1, bias=False)
        if identity_start:
            nn.init.zeros_(self.expand.weight)

    def gate(self, x: Tensor) -> Tensor:
        mean = spatial_mean(x) if self.fast else F.adaptive_avg_pool2d(x, 1).flatten(1)
        with full_precision(x):
            return self.gate_of_mean(mean)

    def gate_of_mean(self, mean: Tensor) -> Tensor:
        """The mask for frames whose spatial mean is ``mean``, ``(N*T, C)``; to be called without autocast."""
        pooled = pointwise(self.squeeze, mean)
        mixed = apply_taps(self.tap_frames(pooled, "squeezed"), taps_of(self.temporal))
        return pointwise(self.expand, self.act(mixed)).sigmoid()[..., None, None]


class ME(Excitation):
    """Motion excitation (Eq. 9): the difference of adjacent frames' squeezed features, pooled.

    With ``f = norm(squeeze(x))``: ``F[t] = mean_hw(K * f[t+1] - f[t])``, zero at the last frame, and
    ``M = sigmoid(expand(F))`` of shape ``(N*T, C, 1, 1)``. K (``transform``) is a depthwise 3x3 convolution
    with zero padding. The batch norm is the released code's; the text has none. Causal:
    ``F[t] = mean_hw(K * f[t] - f[t-1])``, zero at the first frame.

    Args:
        channels: C.
        n_segment: T.
        reduction: ratio of the squeeze, to ``max(1, C // reduction)`` channels.
        norm: ``False`` gives the text's form.
        identity_start: see :class:`Excitation`.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        reduction: int = 16,
        *,
        norm: bool = True,
        identity_start: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, identity_start=identity_start, causal=causal)
        squeezed = max(1, channels // positive_int("reduction", reduction))
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.norm = nn.BatchNorm2d(squeezed) if norm else nn.Identity()
        self.transform = nn.Conv2d(squeezed, squeezed, 3, padding=1, groups=squeezed, bias=False)
        self.expand = nn.Conv2d(squeezed, channels, 1, bias=False)
        if identity_start:
            nn.init.zeros_(self.expand.weight)

    def gate(self, x: Tensor) -> Tensor:
        motion = self.motion(x)
        with full_precision(x):
            return self.gate_of_motion(motion)

    def gate_of_motion(self, motion: Tensor) -> Tensor:
        """The mask for the pooled motion F; to be called without autocast."""
        return pointwise(self.expand, motion).sigmoid()[..., None, None]

    def motion(self, x: Tensor) -> Tensor:
        """The pooled motion F, ``(N*T, squeezed)``."""
        if self.fast and self.linear:
            with full_precision(x):
                return self.motion_of_means(passes.nine_means(x), *x.shape[2:])
        return self.motion_of_squeezed(passes.squeeze(self.squeeze, x) if self.fast else self.squeeze(x))

    def motion_of_squeezed(self, squeezed: Tensor) -> Tensor:
        """The pooled motion F of ``squeeze(x)``."""
        if self.fast:
            # The gradient of the means is the same at most positions: of the squeeze's only a small rest is
            # left, for which PyTorch's batch norm on a CPU sums too inexactly in channels_last
            squeezed = squeezed.contiguous()
        features = self.norm(squeezed)
        if self.fast and read_as_called(self.transform):
            with full_precision(squeezed):
                return self._motion_of_features(passes.nine_means(features), *squeezed.shape[2:])
        if self.causal:
            pooled = (F.adaptive_avg_pool2d(f, 1).flatten(1) for f in (self.transform(features), features))
            return self._difference(*pooled)
        arrived = self.transform(features) - previous(features, self.n_segment)  # F[t-1] at frame t
        return following(F.adaptive_avg_pool2d(arrived, 1).flatten(1), self.n_segment)

    @property
    def linear(self) -> bool:
        """Whether everything before the sigmoid is linear: the batch norm's statistics are fixed."""
        return (
            read_as_called(self.squeeze)
            and read_as_called(self.transform)
            and (isinstance(self.norm, nn.Identity) or _is_affine(self.norm))
            and not has_hooks(self.norm)
        )

    def motion_of_means(self, means: Tensor, height: int, width: int) -> Tensor:
        """The pooled motion F of frames of that size whose :func:`~.ops.nine_means` are ``means``; to be
        called without autocast."""
        # a mean over any positions passes the squeeze and the norm like a pixel
        weight, bias = self.squeeze.weight.flatten(1), self.squeeze.bias
        bias = None if bias is None else bias.to(means.dtype)
        features = linear(means.flatten(0, 1), weight.to(means.dtype), bias)
        if not isinstance(self.norm, nn.Identity):
            features = _normalise(self.norm, features)
        return self._motion_of_features(features.unflatten(0, means.shape[:2]), height, width)

    def _motion_of_features(self, means: Tensor, height: int, width: int) -> Tensor:
        """The pooled motion F from the nine means of f, ``(9, N*T, squeezed)``."""
        weights = coefficients(self.transform.weight.to(means.dtype), height, width)
        transformed = (weights[:, None] * means).sum(0)
        if self.transform.bias is not None:
            transformed = transformed + self.transform.bias.to(means.dtype)
        return self._difference(transformed, means[0])

    def _difference(self, transformed: Tensor, mean: Tensor) -> Tensor:
        """F from the means over the map of ``K * f`` and ``f``, ``(N*T, squeezed)``."""
        if self.causal:
            return self.zero_at_first(transformed - self.past(mean, name="mean")[0])
        return step_ahead(transformed, mean, self.n_segment)


class ActionModule(TemporalModule):
    """The ACTION module: a learnable shift, then the sum of the excited paths (section 3.4).

    With ``y = shift(x)``, the learnable part shift the released code starts with:
    ``sum_p (y + y * gate_p(y)) = y * (P + sum_p gate_p(y))`` over the P chosen paths.

    The released form multiplies activations by about 1.5 P (4.5 with three paths) at the start, in front of
    layers whose batch-norm statistics are ImageNet's. ``identity_start=True`` starts as the identity
    instead: the shift as (0, 1, 0), each gate at exactly 1/2, and the sum averaged and centred,
    ``y * (1 + mean_p (2 * gate_p(y) - 1))``.

    Causal, the shift and every path take their causal form; the weights keep names and shapes.

    Args:
        channels: C.
        n_segment: T.
        reduction: ratio of the squeeze in CE and ME.
        shift_div: see :class:`~temporal_excite.TemporalShift`.
        shift: ``False`` leaves the shift out, the text's form.
        paths: any of ``"ste"``, ``"ce"``, ``"me"``; Table 3's ablations are single paths.
        relu: see :class:`CE`.
        norm: see :class:`ME`.
        identity_start: start as the identity.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        reduction: int = 16,
        shift_div: int = 8,
        *,
        shift: bool = True,
        paths: Sequence[str] = ("ste", "ce", "me"),
        relu: bool = True,
        norm: bool = True,
        identity_start: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        names = list(paths) if isinstance(paths, Sequence) and not isinstance(paths, str) else []
        if not names or any(name not in ("ste", "ce", "me") for name in names) or len({*names}) < len(names):
            raise ValueError(f"paths must be distinct names out of ('ste', 'ce', 'me'), got {paths!r}")
        self.identity_start = identity_start
        self.relu = relu
        init = "identity" if identity_start else "shift"
        self.shift = (
            TemporalConv(channels, n_segment, shift_div, init, causal=causal) if shift else nn.Identity()
        )
        start: Any = {"identity_start": identity_start, "causal": causal}
        self.paths = tuple(path for path in ("ste", "ce", "me") if path in paths)
        if "ste" in paths:
            self.ste = STE(channels, n_segment, **start)
        if "ce" in paths:
            self.ce = CE(channels, n_segment, reduction, relu=relu, **start)
        if "me" in paths:
            self.me = ME(channels, n_segment, reduction, norm=norm, **start)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if not self.fast:
            y = self.shift(x)
            gates = [getattr(self, path).gate(y) for path in self.paths]
            return y * _combine(gates, self.identity_start).to(x.dtype)
        shift: Any = self.shift
        own = type(shift) is TemporalConv and not has_hooks(shift)  # nobody else holds y
        known = self._knows_paths
        motion = self.me if known and "me" in self.paths else None
        squeeze = motion.squeeze if motion and not motion.linear else None
        means = 9 if motion and not squeeze else int("ce" in self.paths)
        if own and known and not squeeze and (conv := shift.by_rows(x)):
            return conv.result(*self._factors(*self._gates(conv.read(means, "ste" in self.paths), x)))
        with memory.not_saved():
            y = passes.note_output(x, shift(x)) if own else shift(x)
            if known:
                y, readings = passes.read(y, squeeze, means, "ste" in self.paths)
                channel, pixel = self._gates(readings, y)
            else:
                channel = [getattr(self, path).gate(y) for path in ("ce", "me") if path in self.paths]
                pixel = [self.ste.gate(y)] if "ste" in self.paths else []
            return passes.gate(y, *self._factors(channel, pixel), reuse=own)

    @property
    def _knows_paths(self) -> bool:
        """Whether the gates can be computed of what :func:`~.passes.read` gives."""
        paths = [getattr(self, path) for path in self.paths]
        if any({"forward", "gate"} & vars(part).keys() for part in (self.shift, *paths)):  # replaced methods
            return False
        if "me" in self.paths and not read_as_called(self.me.squeeze):
            return False
        return all(path.fast and type(path) in (STE, CE, ME) for path in paths)

    def _factors(self, channel: list[Tensor], pixel: list[Tensor]) -> list[Tensor]:
        """What y is multiplied with, as terms of a sum: one for channels, one for pixels, or both."""
        first, *rest = [sum(gates[1:], gates[0]) for gates in (channel, pixel) if gates]
        n = len(self.paths)
        if self.identity_start:  # y * (1 + mean of (2 gate - 1)) = y * (2 / n * sum)
            return [total * (2 / n) for total in (first, *rest)]
        return [first + n, *rest]

    def _gates(self, readings: passes.Readings, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The masks of channels and of pixels, of frames of the size of ``y``."""
        channel, pixel = [], []
        with full_precision(y):
            if "ce" in self.paths:
                channel.append(self.ce.gate_of_mean(readings.means[0]))
            if "ste" in self.paths:
                pixel.append(self.ste.gate_of_mean(readings.channel_mean))
            if "me" in self.paths:
                if readings.squeezed is None:
                    motion = self.me.motion_of_means(readings.means, *y.shape[2:])
                else:
                    motion = self.me.motion_of_squeezed(readings.squeezed)
                channel.append(self.me.gate_of_motion(motion))
        return channel, pixel


def _combine(gates: list[Tensor], centred: bool) -> Tensor:
    """``P + sum gates``, or ``1 + mean (2 gate - 1)``: what the paths multiply their input with."""
    total = sum(gates[1:], gates[0])
    return 1 + (2 * total - len(gates)) / len(gates) if centred else len(gates) + total


def _is_affine(norm: nn.Module) -> bool:
    """Whether a norm scales and offsets each channel by what it holds, whatever the input."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return not norm.training and norm.running_mean is not None
    return type(norm).__name__ == "FrozenBatchNorm2d"  # torchvision's, which timm freezes norms to


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """Vectors ``(N, C)`` by an affine norm."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (None if t is None else t.to(x.dtype) for t in tensors)
    return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)


register_module("action", ActionModule)
for _path in ("ste", "ce", "me"):
    register_module(_path, partial(ActionModule, paths=(_path,)))

"""TEFE's modules: temporal extraction (TE) and feature enhancement (FE).

Jiang, Zhang: An Improved Action Recognition Network With Temporal Extraction and Feature Enhancement, IEEE
Access 10, 2022. No code was released; what the text leaves open is said at each class.
"""

import torch
from torch import Tensor, nn

from .. import passes, past
from ..ops import (
    apply_taps,
    at_each_frame,
    positive_int,
    spatial_mean,
    sum_taps,
    taps_of,
)
from .base import TemporalModule
from .registry import register_module


class TEModule(TemporalModule):
    """Temporal extraction (Eqs. 1-6): a gate from adjacent frames, then a kernel from the whole clip.

    With the spatial mean ``s`` of ``x``, ``(N, C, T)``:

    - short term: ``M = sigmoid(expand * (reduce * s))``, two temporal convolutions of kernel 3 over all
      channels, C -> C // reduction -> C, and ``x0 = M x`` (Eqs. 2-4);
    - long term: ``q = softmax(fc2(fc1(s)))``, two linear layers on the T-vector of each channel,
      T -> 2 T -> 3 (Eq. 5), and ``y[t] = q0 x0[t-1] + q1 x0[t] + q2 x0[t+1]`` per clip and channel, zero
      beyond the clip's ends (Eq. 6).

    The paper gives neither the width between the linear layers (2 T is that of a similar branch in TANet, Liu
    et al., ICCV 2021) nor any activation or bias; there is none here. ``relu=True`` puts a ReLU between the
    linear layers, as TANet has, without which the two are one linear map of rank 3.

    Causal: the taps of the temporal convolutions are frames t-2, t-1 and t, and each frame has a kernel of
    its own, from the last T spatial means: ``q[t] = softmax(fc2(fc1((s[t-T+1], .., s[t]))))``, with zeros
    before the first frame, and ``y[t] = q0[t] x0[t-2] + q1[t] x0[t-1] + q2[t] x0[t]``.

    Args:
        channels: C.
        n_segment: T, the size of the linear layers. It cannot change later, except in the causal form, where
            clips may have any length and this T stays the number of frames a kernel is computed from.
        reduction: r of the short-term branch, to ``max(1, C // reduction)`` channels.
        relu: a ReLU between the two linear layers.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        reduction: int = 4,
        *,
        relu: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        squeezed = max(1, channels // positive_int("reduction", reduction))
        self.reduce = nn.Conv1d(channels, squeezed, 3, padding=1, bias=False)
        self.expand = nn.Conv1d(squeezed, channels, 3, padding=1, bias=False)
        self.fc1 = nn.Linear(n_segment, 2 * n_segment, bias=False)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.fc2 = nn.Linear(2 * n_segment, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        self.check_n_segment(self.n_segment)
        mean, earlier = self._mean_and_past(x)
        gate = self._gate(mean, earlier).to(x.dtype)
        if self.causal:
            kernel = self._kernel(torch.stack([*reversed(earlier[: self.fc1.in_features - 1]), mean], dim=2))
        else:
            kernel = at_each_frame(self._kernel, mean, self.n_segment)
        if self.fast and not past.current():
            # kernel and masks as one, (N*T, C, 1, 3)
            taps = torch.stack(self.tap_frames(gate), -1).flatten(2, 3) * kernel.unsqueeze(2)
            return passes.temporal_conv(x, taps, self.n_segment, self.causal)
        return apply_taps(self.tap_frames(x * gate, "excited"), kernel.unsqueeze(2))

    def _kernel(self, pooled: Tensor) -> Tensor:
        """The long-term branch's kernel q, ``(N, C, 3)``, of T spatial means, ``(N, C, T)``."""
        return self.fc2(self.act(self.fc1(pooled))).softmax(dim=-1)

    def gate(self, x: Tensor) -> Tensor:
        """The short-term branch's mask M, ``(N*T, C, 1, 1)``."""
        return self._gate(*self._mean_and_past(x))

    def _mean_and_past(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The spatial mean s, ``(N*T, C)``; causal with those before, as many as the two branches need."""
        mean = spatial_mean(x).to(x.dtype)
        return mean, self.past(mean, max(2, self.fc1.in_features - 1), "pooled") if self.causal else []

    def _gate(self, mean: Tensor, earlier: list[Tensor]) -> Tensor:
        near = [earlier[1], earlier[0], mean] if self.causal else self.tap_frames(mean)
        squeezed = apply_taps(near, taps_of(self.reduce))
        expanded = apply_taps(self.tap_frames(squeezed, "squeezed"), taps_of(self.expand))
        return expanded.sigmoid()[..., None, None]

    def check_n_segment(self, n_segment: int) -> None:
        if n_segment != self.fc1.in_features and not self.causal:
            raise ValueError(
                f"TEModule cannot work on clips of {n_segment} frames: its linear layers take the "
                f"{self.fc1.in_features}-vector of frames they were built for. Build it anew: eject(model), "
                f"then inject(model, ..., n_segment={n_segment})"
            )


class _Conv3x3x3(nn.Module):
    """The three 2D convolutions of one with three taps in time.

    Its 2D weights are 4-D parameters, so that ``channels_last`` models stay possible. ``center`` is the
    present frame's (and the bias), or None where the caller computes it; ``sides`` holds the other two,
    starting at zero, as the output channels ``(group, tap, channel)``.
    """

    def __init__(self, like: nn.Conv2d, *, center: bool, bias: bool) -> None:
        super().__init__()
        self.groups = like.groups
        self.center = _conv_like(like, like.out_channels, bias) if center else None
        self.sides = _conv_like(like, 2 * like.out_channels, bias=False)
        nn.init.zeros_(self.sides.weight)

    def forward(self, x: Tensor, now: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the taps give of each frame: the first, the last, the present frame's."""
        if self.center is not None:
            now = self.center(x)
        assert now is not None
        first, last = self.sides(x).unflatten(1, (self.groups, 2, -1)).unbind(2)
        return first.flatten(1, 2), last.flatten(1, 2), now


def _conv_like(conv: nn.Conv2d, out_channels: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        conv.in_channels,
        out_channels,
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=bias,
        padding_mode=conv.padding_mode,
    )


class FEModule(TemporalModule):
    """Feature enhancement (Eqs. 9-11): ``y = Conv1(x) * Conv2(x)``, the product of two 3x3x3 convolutions,
    ``(N*T, C, H, W)`` -> ``(N*T, out_channels, H / stride, W / stride)``. Zero padding in time and space.

    Eq. 10's U is the next layer of the host, the bottleneck's last 1x1 convolution. ``conv1`` starts as a 2D
    convolution in its centre tap and zeros elsewhere, ``conv2`` with zero weights and bias 1: at the start
    the module computes that 2D convolution.

    Causal: the kernels' taps are frames t-2, t-1 and t instead of t-1, t and t+1. The 2D convolution at the
    start is that of the present frame all the same: ``center`` is always the tap of frame t.

    :meth:`around` makes the module for a convolution that a network has already: that one stays where it is
    as Conv1's centre tap, and the module takes its output as second argument.

    Args:
        channels: C.
        n_segment: T.
        out_channels: default C.
        kernel_size: odd size of the kernels in space.
        stride: in space.
        dilation: in space; the padding keeps the size where ``stride`` is 1.
        groups: of the convolutions.
        bias: whether ``conv1`` has one.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        out_channels: int | None = None,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "groups": groups}
        for name, value in sizes.items():
            positive_int(name, value)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        out_channels = channels if out_channels is None else positive_int("out_channels", out_channels)
        padding = dilation * (kernel_size // 2)
        self._build(
            nn.Conv2d(channels, out_channels, kernel_size, stride, padding, dilation, groups, bias), own=True
        )

    @classmethod
    def around(cls, conv: nn.Conv2d, n_segment: int = 8, *, causal: bool = False) -> "FEModule":
        """An FE module whose Conv1 has ``conv`` as its centre tap: call it as ``module(x, conv(x))``.

        Stride, padding, dilation and groups are those of ``conv``.
        """
        module = cls.__new__(cls)
        TemporalModule.__init__(module, conv.in_channels, n_segment, causal=causal)
        module._build(conv, own=False)
        return module

    def _build(self, like: nn.Conv2d, own: bool) -> None:
        self.conv1 = _Conv3x3x3(like, center=own, bias=like.bias is not None)
        self.conv2 = _Conv3x3x3(like, center=True, bias=True)
        center = self.conv2.center
        assert center is not None and center.bias is not None
        nn.init.zeros_(center.weight)
        nn.init.ones_(center.bias)

    def forward(self, x: Tensor, now: Tensor | None = None) -> Tensor:
        """``Conv1(x) * Conv2(x)``.

        Args:
            x: ``(N*T, C, H, W)``.
            now: the output of Conv1's centre tap if the module was made by :meth:`around`; else None.

        Raises:
            TypeError: ``now`` is missing, or given to a module with a centre tap of its own.
            ValueError: ``x`` has another shape.
        """
        self.check(x)
        if (now is None) == (self.conv1.center is None):
            raise TypeError(
                "FEModule made by around(conv) needs its output: module(x, conv(x))"
                if now is None
                else "FEModule has a centre tap of its own: call module(x)"
            )
        return self._sum(self.conv1(x, now), "conv1") * self._sum(self.conv2(x), "conv2")

    def _sum(self, taps: tuple[Tensor, Tensor, Tensor], name: str) -> Tensor:
        first, last, now = taps
        if not self.causal:
            return sum_taps(first, now, last, self.n_segment)
        # a frame's taps are computed once, and wait for the frames they are for
        (before,) = self.past(first, name=f"{name}.0")
        (waiting,) = self.past(last + before, name=f"{name}.1")
        return now + waiting


register_module("te", TEModule)

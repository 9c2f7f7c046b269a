"""TEA's modules: motion excitation, multiple temporal aggregation, and the block they make.

Li, Ji, Shi, Zhang, Kang, Wang: TEA: Temporal Excitation and Aggregation for Action Recognition, CVPR 2020.
``form="released"``, the default everywhere, computes what the authors' released code computes (on Res2Net-50
26w4s), ``form="text"`` what the paper's equations say; docs/fidelity.md lists the differences.
"""

import torch
from torch import Tensor, nn

from .. import passes
from ..ops import has_hooks, pointwise, positive_int, traced
from .action import ME
from .base import TemporalModule
from .registry import register_module
from .tsm import TemporalConv


class MotionExcitation(ME):
    """TEA's motion excitation (Eqs. 1-5): ``y = x + x * A``.

    The pooled motion F is that of ACTION-Net's :class:`~temporal_excite.ME`, whose source this is: with
    ``f = norm(squeeze(x))``, ``F[t] = mean_hw(transform * f[t+1] - f[t])``, zero at the last frame. Then

    - released: ``A = sigmoid(norm2(expand(F))) - 1/2``, within (-1/2, 1/2);
    - text (Eq. 4): ``A = 2 sigmoid(expand(F)) - 1``, within (-1, 1), and ``f = squeeze(x)``: no batch norms.

    Causal: ``F[t] = mean_hw(transform * f[t] - f[t-1])``, zero at the first frame.

    Args:
        channels: C.
        n_segment: T.
        reduction: ratio of the squeeze, to ``max(1, C // reduction)`` channels.
        residual: ``False`` gives ``y = x * A``, the paper's "ME w/o Residual" (Fig. 4 f).
        form: ``"released"`` or ``"text"``.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        reduction: int = 16,
        *,
        residual: bool = True,
        form: str = "released",
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, reduction, norm=_check_form(form) == "released", causal=causal)
        self.residual = residual
        self.form = form
        self.between_relus = False
        """Whether the input is a ReLU's result that nothing else reads, and the result goes to a ReLU."""
        self.norm2 = nn.BatchNorm2d(channels) if form == "released" else nn.Identity()

    def gate(self, x: Tensor) -> Tensor:
        """The motion-attentive weights A, ``(N*T, C, 1, 1)``."""
        return self.gate_of_motion(self.motion(x))

    def gate_of_motion(self, motion: Tensor) -> Tensor:
        gate = self.norm2(pointwise(self.expand, motion)[..., None, None]).sigmoid() - 0.5
        return gate if self.form == "released" else 2 * gate

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.fast and self.between_relus:
            return self._excite_rectified(x)
        gate = 1 + self.gate(x) if self.residual else self.gate(x)
        return passes.gate(x, gate) if self.fast else x * gate.to(x.dtype)

    def _excite_rectified(self, x: Tensor) -> Tensor:
        hooked = not traced() and any(map(has_hooks, self.modules()))
        if hooked or self.form == "text" or self.linear or not passes.trains_precisely(x, self.squeeze):
            reuse = not (hooked or hasattr(x, "kept"))
            y = passes.gate(x, 1 + self.gate(x), reuse=reuse)
            return y if hooked else passes.rectified(y)

        def gate_of(squeezed: Tensor) -> Tensor:  # within (1/2, 3/2)
            return 1 + self.gate_of_motion(self.motion_of_squeezed(squeezed))

        return passes.rectified(passes.excite(x, self.squeeze.weight, gate_of))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual={self.residual}, form={self.form!r}"


class MTA(TemporalModule):
    """Multiple temporal aggregation (Eqs. 6, 7): a 3x3 convolution as a cascade of sub-convolutions in time
    and space, ``(N*T, C, H, W)`` -> ``(N*T, C, H / stride, W / stride)``.

    The channels are split into ``scale`` parts X_1 .. X_s of equal width; ``temp`` is a depthwise temporal
    convolution (``shifts``), ``spa`` a 3x3 convolution (``convs``), and the parts are concatenated.

    - released: ``Y_i = relu(norm(spa(temp(X_i + Y_{i-1}))))`` for i < s, without ``Y_{i-1}`` at i = 1, and
      ``Y_s = temp(X_s)``. The first s - 1 temporal convolutions start as the identity, the last one as a
      shift of all its channels, one half each way.
    - text (Eq. 6): ``Y_1 = X_1``, ``Y_2 = spa(temp(X_2))``, ``Y_i = spa(temp(X_i + Y_{i-1}))`` for i > 2;
      no norm, no activation; every temporal convolution starts as the part shift (appendix A).

    In a ``stage`` block, the first of a stage, no part adds the one before it and the part without a 3x3
    convolution is average-pooled (3x3, the block's stride), after its temporal convolution.

    Causal: every ``temp`` is a causal :class:`~temporal_excite.TemporalConv`; a shift one half each way
    becomes one of half the channels from the previous frame.

    Args:
        channels: C, a multiple of ``scale``.
        n_segment: T.
        scale: s, the number of parts, at least 2.
        stride: of the 3x3 convolutions.
        stage: whether the block is the first of a stage; default: where ``stride > 1``.
        dilation: of the 3x3 convolutions.
        groups: of the 3x3 convolutions.
        form: ``"released"`` or ``"text"``.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        scale: int = 4,
        *,
        stride: int = 1,
        stage: bool | None = None,
        dilation: int = 1,
        groups: int = 1,
        form: str = "released",
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        if positive_int("scale", scale) < 2 or channels % scale:
            raise ValueError(f"scale must be at least 2 and divide channels={channels}, got {scale}")
        self.width = channels // scale
        if self.width % positive_int("groups", groups):
            raise ValueError(
                f"groups={groups} must divide a part's {self.width} channels ({channels} / {scale})"
            )
        self.scale = scale
        self.form = _check_form(form)
        positive_int("stride", stride)
        positive_int("dilation", dilation)
        self.stage = stride > 1 if stage is None else stage
        if stride > 1 and not self.stage:
            raise ValueError(f"stride={stride} needs stage=True: parts of different size cannot be added")
        released = form == "released"
        self.shifts = nn.ModuleList(
            TemporalConv(self.width, n_segment, init="identity" if released else "shift", causal=causal)
            for _ in range(scale - 1)
        )
        if released:
            self.shifts.append(TemporalConv(self.width, n_segment, shift_div=2, causal=causal))
        self.convs = nn.ModuleList(
            nn.Conv2d(
                self.width,
                self.width,
                3,
                stride,
                padding=dilation,
                dilation=dilation,
                groups=groups,
                bias=False,
            )
            for _ in range(scale - 1)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(self.width) if released else nn.Identity() for _ in range(scale - 1)
        )
        self.act = nn.ReLU(inplace=True) if released else nn.Identity()
        self.pool = nn.AvgPool2d(3, stride, padding=1) if self.stage else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        parts = list(x.split(self.width, dim=1))
        # the part that has no 3x3 convolution: the last (released) or the first (text)
        plain = parts.pop(-1 if self.form == "released" else 0)
        outputs: list[Tensor] = []
        for part, shift, conv, norm in zip(parts, self.shifts, self.convs, self.norms, strict=False):
            if outputs and not self.stage:
                part = part + outputs[-1]
            outputs.append(self.act(norm(conv(passes.as_recomputable(part, shift(part), shift)))))
        if self.form == "released":
            last = self.shifts[-1]
            outputs.append(self.pool(passes.as_recomputable(plain, last(plain), last)))
        else:
            outputs.insert(0, self.pool(plain))
        return torch.cat(outputs, dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, stage={self.stage}, form={self.form!r}"


class TEABlock(TemporalModule):
    """The TEA block (Fig. 3): a bottleneck whose 1x1 convolution is followed by motion excitation and whose
    3x3 convolution is MTA, ``(N*T, in_channels, H, W)`` -> ``(N*T, out_channels, H / stride, W / stride)``.

    ``y = relu(norm3(conv3(mta(me(relu(norm1(conv1(x))))))) + downsample(x))``

    With the defaults the block is that of the released network, built on Res2Net-50 26w4s: parts of
    ``out_channels // 4 * base_width // 64`` channels. ``downsample`` is a 1x1 convolution with batch norm
    where the shape changes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        n_segment: T.
        stride: of the 3x3 convolutions and the shortcut.
        stage: whether the block is the first of a stage (see :class:`MTA`); default: where the shape changes.
        base_width: width of a part per 64 channels of ``out_channels // 4``.
        scale: number of parts.
        reduction: of :class:`MotionExcitation`.
        form: ``"released"`` or ``"text"``, for both modules.
        causal: the causal form of both modules.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_segment: int = 8,
        *,
        stride: int = 1,
        stage: bool | None = None,
        base_width: int = 26,
        scale: int = 4,
        reduction: int = 16,
        form: str = "released",
        causal: bool = False,
    ) -> None:
        super().__init__(in_channels, n_segment, causal=causal)
        self.out_channels = positive_int("out_channels", out_channels)
        width = out_channels // 4 * positive_int("base_width", base_width) // 64
        if width < 1:
            raise ValueError(
                f"out_channels={out_channels} with base_width={base_width} leaves parts of "
                f"out_channels // 4 * base_width // 64 = {width} channels; make either larger"
            )
        inner = width * positive_int("scale", scale)
        reshapes = positive_int("stride", stride) > 1 or in_channels != out_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.me = MotionExcitation(inner, n_segment, reduction, form=form, causal=causal)
        stage = reshapes if stage is None else stage
        self.mta = MTA(inner, n_segment, scale, stride=stride, stage=stage, form=form, causal=causal)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if reshapes:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = self.me(self.act(self.norm1(self.conv1(x))))
        y = self.norm3(self.conv3(self.mta(y)))
        return self.act(y + self.downsample(x))


class PartConv(TemporalModule):
    """:class:`TemporalConv` on the last ``width`` channels: MTA's last part where the parts are joined again.

    Args:
        channels: C.
        n_segment: T.
        width: channels of the part; its convolution starts as a shift, one half each way.
        causal: the causal form of the convolution, which starts as a shift of one half.
    """

    def __init__(self, channels: int, n_segment: int = 8, *, width: int, causal: bool = False) -> None:
        super().__init__(channels, n_segment, causal=causal)
        if positive_int("width", width) > channels:
            raise ValueError(f"width={width} is more than the {channels} channels")
        self.conv = TemporalConv(width, n_segment, shift_div=2, causal=causal)
        self.overwrites = False
        """Whether, without gradients, the result may take the memory of the input: nothing else reads it."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        rest, part = x.tensor_split((self.channels - self.conv.channels,), dim=1)
        alone = self.overwrites and not traced() and not has_hooks(self)
        if alone and not passes.needs_grad(x, self.conv.weight):
            part.copy_(self.conv(part))
            return x
        # a copy, so that the backward pass keeps the part and not the whole
        return torch.cat([rest, self.conv(part.clone())], dim=1)


def _check_form(form: str) -> str:
    if form not in ("released", "text"):
        raise ValueError(f"form must be 'released' or 'text', got {form!r}")
    return form


register_module("tea_me", MotionExcitation)

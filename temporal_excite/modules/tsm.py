"""TSM's shift and its learnable form.

Lin, Gan, Han: TSM: Temporal Shift Module for Efficient Video Understanding, ICCV 2019; the learnable form
is TEA (Li et al., CVPR 2020), appendix A, Eq. 10, and the first step of the released ACTION-Net.
"""

import torch
from torch import Tensor, nn

from .. import passes, past
from ..ops import apply_taps, following, positive_int, previous, temporal_conv
from .base import TemporalModule
from .registry import register_module


class TemporalShift(TemporalModule):
    """TSM's part shift: with ``fold = C // shift_div``, channels ``[0, fold)`` show the next frame,
    ``[fold, 2*fold)`` the previous one, the rest the present; zeros at the clip's ends (TEA, Eq. 9).

    Causal, the paper's uni-directional TSM (section 4.2): channels ``[0, fold)`` show the previous frame, the
    rest the present.

    Args:
        channels: C.
        n_segment: T.
        shift_div: share of the channels that moves in each direction is ``1 / shift_div``, at least 2.
        causal: the causal form.
    """

    def __init__(
        self, channels: int, n_segment: int = 8, shift_div: int = 8, *, causal: bool = False
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        self.fold = shift_fold(channels, shift_div)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.causal:
            if not self.fold:
                return x
            if self.fast and not past.current():
                return passes.part_shift(x, 0, self.fold, self.n_segment)
            moving, rest = x.tensor_split((self.fold,), dim=1)
            return torch.cat([*self.past(moving), rest], dim=1)
        if self.fast:
            return passes.part_shift(x, self.fold, self.fold, self.n_segment)
        to_past, to_future, rest = x.tensor_split((self.fold, 2 * self.fold), dim=1)
        moved = following(to_past, self.n_segment), previous(to_future, self.n_segment)
        return torch.cat([*moved, rest], dim=1)


class TemporalConv(TemporalModule):
    """Learnable temporal convolution, kernel 3, zero padding, no bias.

    ``y[t] = w0 x[t-1] + w1 x[t] + w2 x[t+1]``: per channel with ``weight`` of shape ``(C, 1, 3)``, or over
    all channels with ``weight`` of shape ``(C, C, 3)``. TEA's Table 5 compares ``init="shift"`` (its
    "Shift"), ``init="random"`` ("CW") and ``init="random", depthwise=False`` ("Conv").

    Causal: ``y[t] = w0 x[t-2] + w1 x[t-1] + w2 x[t]``, and the starts are those of a causal
    :class:`TemporalShift` and the identity.

    Args:
        channels: C.
        n_segment: T.
        shift_div: as for :class:`TemporalShift`; used by ``init="shift"``.
        init: ``"shift"`` starts as :class:`TemporalShift`, ``"identity"`` as the identity,
            ``"random"`` as PyTorch's Conv1d.
        depthwise: ``False`` lets every output channel see all input channels.
        causal: the causal form.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        shift_div: int = 8,
        init: str = "shift",
        *,
        depthwise: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(channels, n_segment, causal=causal)
        if init not in ("shift", "identity", "random"):
            raise ValueError(f"init must be 'shift', 'identity' or 'random', got {init!r}")
        self.init = init
        self.depthwise = depthwise
        self.fold = shift_fold(channels, shift_div)
        self.weight = nn.Parameter(torch.empty(channels, 1 if depthwise else channels, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start that ``init`` names."""
        if self.init == "random":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            return
        fold = self.fold if self.init == "shift" else 0
        with torch.no_grad():
            self.weight.zero_()
            # (C, 3): the taps that join a channel with itself
            own = self.weight[:, 0] if self.depthwise else self.weight.diagonal().T
            if self.causal:
                own[:fold, 1] = 1
                own[fold:, 2] = 1
            else:
                own[:fold, 2] = 1
                own[fold : 2 * fold, 0] = 1
                own[2 * fold :, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.depthwise and self.fast and not past.current():
            return passes.temporal_conv(x, self.weight, self.n_segment, self.causal)
        if self.causal:
            return apply_taps(self.tap_frames(x), self.weight)
        return temporal_conv(x, self.weight, self.n_segment)

    def by_rows(self, x: Tensor) -> passes.RowConv | None:
        """``self(x)`` before it is stored; None where it has no such form."""
        if self.depthwise and self.fast and not past.current():
            self.check(x)
            return passes.row_conv(x, self.weight, self.n_segment, self.causal)
        return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init!r}, depthwise={self.depthwise}"


def shift_fold(channels: int, shift_div: int) -> int:
    """Number of channels that move in each direction: ``channels // shift_div``."""
    if positive_int("shift_div", shift_div) < 2:
        raise ValueError(f"shift_div must be at least 2 (two groups of C // shift_div move), got {shift_div}")
    return channels // shift_div


def _learnable_shift(
    channels: int,
    n_segment: int = 8,
    shift_div: int = 8,
    identity_start: bool = False,
    causal: bool = False,
) -> TemporalConv:
    init = "identity" if identity_start else "shift"
    return TemporalConv(channels, n_segment, shift_div, init=init, causal=causal)


register_module("tsm", TemporalShift)
register_module("shift", _learnable_shift)

"""What every temporal module has in common: its shape contract, and the past where it is causal."""

from typing import TypeVar

from torch import Tensor, nn

from .. import past
from ..ops import check_frames, check_model, first_zeroed, following, positive_int, previous

Model = TypeVar("Model", bound=nn.Module)


class TemporalModule(nn.Module):
    """A module on frames ``(N*T, C, H, W)`` that lets the T frames of a clip see each other.

    Subclasses keep shape, dtype, device and memory format, and call :meth:`check` first.

    Args:
        channels: C.
        n_segment: T, the number of frames of a clip.
        causal: the output at frame t depends on frames up to t alone. The module then takes what it needs of
            earlier frames from :meth:`past`, and works frame by frame too (:class:`~temporal_excite.Stream`).
    """

    fast: bool = True
    """Whether to compute by the rearrangements of docs/performance.md, equal up to rounding, or step by step
    as published (see :func:`~temporal_excite.set_fast`)."""

    causal: bool = False
    """Whether the output at frame t depends on frames up to t alone."""

    def __init__(self, channels: int, n_segment: int = 8, *, causal: bool = False) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.n_segment = positive_int("n_segment", n_segment)
        self.causal = causal

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless ``x`` is ``(N*n_segment, channels, H, W)``, a ``TypeError`` for
        integers if the module has weights; in a step of a stream any number of frames, one a stream, and a
        ``RuntimeError`` unless the step is this module's."""
        if step := past.current():
            step.check(self)
        check_frames(x, 1 if step else self.n_segment, self.channels)
        if not x.is_floating_point() and next(self.parameters(), None) is not None:
            raise TypeError(f"expected frames of floating point, got {x.dtype}; convert them with x.float()")

    def past(self, x: Tensor, steps: int = 1, name: str = "x") -> list[Tensor]:
        """``x`` of 1 .. ``steps`` frames ago, latest first; zeros before a clip's or a stream's first frame.

        On whole clips ``x`` is ``(N*T, ...)`` and moves in time. In a step it is ``(B, ...)``, a frame of
        each stream: the past comes from the state and ``x`` goes there, as ``<module>.<name>.<k>``.
        """
        if step := past.current():
            return step.past(self, x, steps, name)
        return [previous(x, self.n_segment, k) for k in range(1, steps + 1)]

    def tap_frames(self, x: Tensor, name: str = "x") -> list[Tensor]:
        """``x`` of the frames that the taps of a temporal convolution meet: t-1, t and t+1, zero beyond the
        clip's ends; causal t-2, t-1 and t, as :meth:`past` has them."""
        if self.causal:
            return [*reversed(self.past(x, 2, name)), x]
        return [previous(x, self.n_segment), x, following(x, self.n_segment)]

    def zero_at_first(self, x: Tensor) -> Tensor:
        """``x``, ``(N*T, ...)``, zero at the first frame of each clip or stream."""
        if step := past.current():
            return x.masked_fill(step.first.view(-1, *[1] * (x.ndim - 1)), 0)
        return first_zeroed(x, self.n_segment)

    def check_n_segment(self, n_segment: int) -> None:
        """Raise a ``ValueError`` if the module cannot work on clips of ``n_segment`` frames."""

    def extra_repr(self) -> str:
        causal = ", causal=True" if self.causal else ""
        return f"channels={self.channels}, n_segment={self.n_segment}{causal}"


def is_causal(module: nn.Module) -> bool:
    """Whether a module, with all its parts that work on clips, never looks ahead."""
    parts = [m for m in module.modules() if hasattr(m, "causal") or hasattr(m, "n_segment")]
    return bool(parts) and all(getattr(part, "causal", False) is True for part in parts)


def set_fast(model: Model, fast: bool) -> Model:
    """Make every temporal module of a model use its fast form, or the published form step by step; in place.

    Both give the same result up to rounding. The fast form is the default.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, TemporalModule):
            module.fast = fast
    return model

"""What every temporal module has in common: its shape contract."""

from typing import TypeVar

from torch import Tensor, nn

from ..ops import check_frames, positive_int

Model = TypeVar("Model", bound=nn.Module)


class TemporalModule(nn.Module):
    """A module on frames ``(N*T, C, H, W)`` that lets the T frames of a clip see each other.

    Subclasses keep shape, dtype, device and memory format, and call :meth:`check` first.

    Args:
        channels: C.
        n_segment: T, the number of frames of a clip.
    """

    fast: bool = True
    """Whether to compute by the rearrangements of docs/performance.md, equal up to rounding, or step by step
    as published (see :func:`~temporal_excite.set_fast`)."""

    def __init__(self, channels: int, n_segment: int = 8) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.n_segment = positive_int("n_segment", n_segment)

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless ``x`` is ``(N*n_segment, channels, H, W)``."""
        check_frames(x, self.n_segment, self.channels)

    def check_n_segment(self, n_segment: int) -> None:
        """Raise a ``ValueError`` if the module cannot work on clips of ``n_segment`` frames."""

    def extra_repr(self) -> str:
        return f"channels={self.channels}, n_segment={self.n_segment}"


def set_fast(model: Model, fast: bool) -> Model:
    """Let every temporal module of a model compute by its fast form, or step by step as published; in place.

    Both give the same result up to rounding. Modules start fast.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, TemporalModule):
            module.fast = fast
    return model

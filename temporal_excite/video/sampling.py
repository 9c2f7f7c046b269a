"""Which frames of a video a model sees."""

import torch
from torch import Tensor

from ..ops import positive_int

MODES = ("train", "test", "dense", "dense-train")


class SegmentSampler:
    """Frame indices of the clips taken from one video.

    ``sampler(num_frames, generator)`` returns a ``LongTensor`` of shape ``(clips, n_segment)``: 0-based frame
    indices in ``[0, num_frames)``, in temporal order within each clip.
    With F frames and T = ``n_segment``:

    ``"train"`` (sparse, random; TSN, Sec. 3.1)
        The video is cut into T segments of equal length ``d = floor(F / T)``; frame i is
        ``i*d + u_i`` with ``u_i`` uniform in ``{0, .., d-1}``. The ``F - T*d`` last frames are never taken,
        as in the released code of TSN, TSM and ACTION-Net.
        With F < T there is no segment to draw from. ``short="first"`` does as that code does: T times frame
        0. ``short="spread"`` takes the frames of ``"test"`` instead, which repeats frames but keeps the
        motion; prefer it when your own clips can be shorter than T.
    ``"test"`` (sparse, fixed)
        Segments of length ``F / T`` (not rounded). Clip k of K takes from each of them the frame at the
        fraction ``(k + 1/2) / K``: ``floor(F/T * (i + (k + 1/2) / K))``. One clip is the segments' centres,
        ``floor(F/(2T) + i*F/T)``; ten clips are the papers' "10 clips sampled from the full-length video",
        here spread evenly over each segment rather than drawn at random, so that a result can be repeated.
        Shorter videos repeat frames.
    ``"dense"`` (a window; I3D, as the non-local networks and TSM use it on Kinetics)
        T frames at a stride of ``max(1, window // T)``, that is a window of about ``window`` = 64 frames at
        any T. Clip k of K starts at ``floor(k/(K-1) * S)`` with S = F - window the last possible start; one
        clip starts at ``S // 2``. A video shorter than the window is taken as one window: T frames spread
        over all of it. (TSM's code goes on from the first frame there, a jump back in time inside the clip.)
    ``"dense-train"``
        The same window with a start drawn uniformly from ``{0, .., S}``.

    All randomness comes from ``generator`` (torch's global one when ``None``), the fixed modes use none.

    TSN: Wang et al., "Temporal Segment Networks", ECCV 2016. TSM: Lin et al., ICCV 2019.

    Args:
        n_segment: T.
        mode: ``"train"``, ``"test"``, ``"dense"`` or ``"dense-train"``.
        clips: number of clips; in the random modes they are independent draws.
        window: of the dense modes, in frames.
        short: of ``"train"``, for videos of fewer than T frames: ``"first"`` or ``"spread"``.

    Raises:
        TypeError: a number that is not an int.
        ValueError: an unknown mode or ``short``, or a number (``num_frames`` too) below 1.

    >>> SegmentSampler(4, mode="test")(20)
    tensor([[ 2,  7, 12, 17]])
    """

    def __init__(
        self, n_segment: int, mode: str = "train", clips: int = 1, *, window: int = 64, short: str = "first"
    ) -> None:
        self.n_segment = positive_int("n_segment", n_segment)
        self.clips = positive_int("clips", clips)
        self.window = positive_int("window", window)
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        if short not in ("first", "spread"):
            raise ValueError(f"short must be 'first' or 'spread', got {short!r}")
        self.mode = mode
        self.short = short

    def __repr__(self) -> str:
        return f"SegmentSampler({self.n_segment}, mode={self.mode!r}, clips={self.clips})"

    @property
    def random(self) -> bool:
        """Whether the indices depend on the generator."""
        return self.mode in ("train", "dense-train")

    def __call__(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        if positive_int("num_frames", num_frames) < self.n_segment and self.mode == "train":
            if self.short == "first":
                return torch.zeros(self.clips, self.n_segment, dtype=torch.long)
            return self._spread(num_frames, 1).expand(self.clips, -1).clone()
        if self.mode == "train":
            length = num_frames // self.n_segment
            offset = torch.randint(length, (self.clips, self.n_segment), generator=generator)
            return torch.arange(self.n_segment) * length + offset
        if self.mode == "test":
            return self._spread(num_frames, self.clips)
        stride = max(1, self.window // self.n_segment)
        last_start = num_frames - max(self.window, self.n_segment)
        if last_start < 0:
            return self._spread(num_frames, 1).expand(self.clips, -1).clone()
        if self.mode == "dense-train":
            start = torch.randint(last_start + 1, (self.clips,), generator=generator)
        elif self.clips == 1:
            start = torch.tensor([last_start // 2])
        else:
            start = torch.arange(self.clips) * last_start // (self.clips - 1)
        return start[:, None] + torch.arange(self.n_segment) * stride

    def _spread(self, num_frames: int, clips: int) -> Tensor:
        # floor(F/T * (i + (k + 1/2)/K)) in whole numbers: F * (2K*i + 2k + 1) // (2KT)
        position = 2 * clips * torch.arange(self.n_segment) + (2 * torch.arange(clips) + 1)[:, None]
        return num_frames * position // (2 * clips * self.n_segment)

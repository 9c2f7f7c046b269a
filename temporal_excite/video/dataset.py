"""Videos and their labels as a map-style data set."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .annotations import Record
from .decoding import FrameCountError, VideoError, open_frames
from .sampling import SegmentSampler

logger = logging.getLogger(__name__)
_ATTEMPTS = 100


class VideoDataset(Dataset[tuple[Tensor, int]]):
    """Clips of labelled videos, decoded on demand.

    ``dataset[i]`` is ``(clip, label)``. With one view the clip is ``(T, 3, H, W)``; with several (``clips``
    of the sampler times the crops of the transform) it is ``(views, T, 3, H, W)``, all crops of the first
    clip first. Without a transform it is uint8, and all clips of a batch must happen to have one size.

    Args:
        records: what :func:`read_annotations` returns, or your own :class:`Record` objects.
        sampler: a :class:`SegmentSampler`.
        transform: called as ``transform(clip, label) -> (clip, label)`` with the uint8 ``(T, 3, H, W)``
            ``tv_tensors.Video`` of each clip: any composition of torchvision.transforms.v2, or the ready
            :func:`train_transform` and :func:`test_transform`. A transform that takes several crops adds a
            leading dimension.
        pattern: names of the pictures in frame folders; found automatically if the folder holds one kind.
        on_error: ``"raise"`` stops at a broken, empty or missing video with a :class:`VideoError` naming it.
            ``"skip"`` logs it (a warning of the logger ``temporal_excite.video.dataset``), counts it in
            ``errors`` and gives another record in its place, drawn from (seed, epoch, i), so that the run can
            be repeated. Meant for training: when evaluating, leave out the indices in ``broken``.
        labels: the class names, ``labels[record.label]``; every record's label must then be in range.
        keep: keep the decoded frames of every video in memory (3 T H W bytes a clip, in each process). Needs
            a sampler that always takes the same frames. For small videos, whose decoding costs more than
            their training.
        seed: all random choices of item i, its frames and its augmentation, depend on ``(seed, epoch, i)``
            alone: not on the number of workers, nor on what was read before. Call ``set_epoch`` before each
            epoch; it reaches workers that are already running.

    Raises:
        ValueError: no records, an unknown ``on_error``, ``keep`` with a random sampler, or a label out of
            range (naming the record).
        VideoError: on access, with ``on_error="raise"``, a video that cannot be read.
        RuntimeError: on access, with ``on_error="skip"``, 100 videos that cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        sampler: SegmentSampler,
        transform: Callable[..., Any] | None = None,
        *,
        pattern: str | None = None,
        on_error: str = "raise",
        labels: Sequence[str] | None = None,
        keep: bool = False,
        seed: int = 0,
    ) -> None:
        if not records:
            raise ValueError("no records: the annotation file is empty or names no videos of this split")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if keep and getattr(sampler, "random", False):
            raise ValueError(f"keep=True needs a sampler that takes the same frames again, got {sampler!r}")
        for record in records:
            if labels is not None and not 0 <= record.label < len(labels):
                raise ValueError(f"{record.path}: label {record.label} is not in 0 .. {len(labels) - 1}")
        self.records = list(records)
        self.sampler = sampler
        self.transform = transform
        self.pattern = pattern
        self.on_error = on_error
        self.labels = None if labels is None else list(labels)
        self.keep = keep
        self._kept: dict[int, Tensor] = {}
        self.seed = seed
        # shared memory, so that worker processes see the epoch and this process sees their errors
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._broken = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def epoch(self) -> int:
        """What :meth:`set_epoch` has set, 0 before."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other frames and augmentations from now on, also in running workers."""
        self._epoch.fill_(epoch)

    @property
    def broken(self) -> list[int]:
        """The indices of the records that could not be read, when last tried, by this process or a worker."""
        return self._broken.nonzero().flatten().tolist()

    @property
    def errors(self) -> int:
        """How many records could not be read, when last tried, by this process or a worker."""
        return int(self._broken.sum())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} videos")
        index %= len(self)
        state = np.random.SeedSequence((self.seed, self.epoch, index))
        if self.on_error == "raise":
            return self._load(index, state)
        substitutes = np.random.default_rng(state.spawn(1)[0])
        candidate = index
        for _ in range(_ATTEMPTS):
            try:
                loaded = self._load(candidate, state)
                if candidate == index:
                    self._broken[index] = False  # it may have been out of reach for a while
                return loaded
            except VideoError as error:
                if not self._broken[candidate]:
                    logger.warning("skipped: %s", error)
                    self._broken[candidate] = True
            candidate = int(substitutes.integers(len(self)))
        raise RuntimeError(
            f"no readable video in {_ATTEMPTS} tries for item {index} ({self.records[index].path}); "
            f"{self.errors} of {len(self)} are known to be unreadable: check the data folder"
        )

    def _load(self, index: int, state: np.random.SeedSequence) -> tuple[Tensor, int]:
        record = self.records[index]
        # two streams, or the first frame and the first crop would be drawn from one number
        views_seed, frames_seed = (int(s >> np.uint64(1)) for s in state.generate_state(2, np.uint64))
        clips = self._kept[index] if index in self._kept else self._read(record, frames_seed)
        if self.keep:
            self._kept[index] = clips
        if self.transform is None:
            return (clips[0] if len(clips) == 1 else clips), record.label
        # the transforms of torchvision draw from torch's global generator
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(views_seed)  # torch.manual_seed would reseed the GPUs too
            return transformed(self.transform, clips, record.label)

    def _read(self, record: Record, seed: int) -> Tensor:
        """uint8 ``(clips, T, 3, H, W)``."""
        with open_frames(record.path, self.pattern) as frames:
            length = len(frames)
            while True:
                count = length - record.start if record.num_frames is None else record.num_frames
                if count < 1 or record.start + count > length:
                    raise VideoError(
                        Path(record.path),
                        f"has {length} frames, the record takes {max(count, 1)} from {record.start} on",
                    )
                indices = self.sampler(count, torch.Generator().manual_seed(seed)) + record.start
                try:
                    pictures = frames.read(indices.flatten().tolist())
                except FrameCountError as error:
                    length = error.num_frames  # some packets hold no picture: sample from those that do
                    logger.info("%s", error)
                    continue
                return pictures.unflatten(0, tuple(indices.shape))


def transformed(transform: Callable[..., Any], clips: Tensor, label: int) -> tuple[Tensor, int]:
    """The view or views of uint8 clips ``(clips, T, 3, H, W)``, and the label of what they show."""
    views = []
    for clip in clips:
        view, shown = transform(tv_tensors.Video(clip), label)
        views.append(view.as_subclass(Tensor))
    stacked = torch.stack(views) if views[0].ndim == 4 else torch.cat(views)
    return (stacked[0] if len(stacked) == 1 else stacked).contiguous(), int(shown)

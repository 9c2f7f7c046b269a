"""The data sets of a training folder: which files the recipes' layouts expect, and what is done to the
frames."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..video import (
    Record,
    SegmentSampler,
    VideoDataset,
    flip_pairs,
    read_annotations,
    read_labels,
    test_transform,
    train_transform,
)
from ..video.decoding import VIDEOS
from .checkpoint import ModelConfig
from .evaluate import parse_protocol

logger = logging.getLogger(__name__)

_CODE = re.compile(r"[A-Za-z]{0,6}[ _-]?\d+[A-Za-z]?")

LAYOUTS: dict[str, tuple[str, str, str]] = {
    "tsn": ("train.txt", "val.txt", "."),
    "sthv1": ("*-train.csv", "*-validation.csv", "20bn-something-something-v1"),
    "sthv2": ("*train.json", "*validation.json", "20bn-something-something-v2"),
    "jester": ("*-train.csv", "*-validation.csv", "20bn-jester-v1"),
    "egogesture": ("labels-final-revised1", "labels-final-revised1", "images"),
    "kinetics": ("train.csv", "val*.csv", "{subset}"),
    "ucf101": ("**/trainlist01.txt", "**/testlist01.txt", "UCF-101"),
    "hmdb51": ("testTrainMulti_7030_splits", "testTrainMulti_7030_splits", "hmdb51"),
}
"""For each annotation format: where the lists of the training and of the validation set and the videos
are."""


def layouts() -> list[str]:
    """The names ``format`` of :func:`load_records` takes."""
    return ["folder", *LAYOUTS]


def load_records(
    data: str | Path,
    format: str,
    subset: str,
    *,
    listing: str | Path | None = None,
    root: str | Path | None = None,
    labels: Sequence[str] | str | Path | None = None,
) -> tuple[list[Record], list[str]]:
    """The records and class names of one subset of a data folder.

    ``"folder"`` is ``data/train/CLASS/video`` and ``data/val/CLASS/video``; a video is a file, or a folder
    of pictures. Names that begin with "." or "@", and ``__MACOSX``, are left out; so are files with unknown
    endings, with a warning. The other formats are those of :func:`~temporal_excite.video.read_annotations`.

    Args:
        data: the folder.
        format: one of :func:`layouts`.
        subset: "train" or "val"; the data to test on is the latter.
        listing: the annotation file, where it is not the layout's.
        root: the folder of the videos, where it is not the layout's.
        labels: the class names in order, or their file.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: an unknown subset or format, annotations that are wrong, a class folder without videos
            where ``labels`` does not name the classes, or a ``root`` for ``"folder"``.
    """
    if subset not in ("train", "val"):
        raise ValueError(f"subset must be 'train' or 'val', got {subset!r}")
    data = Path(data)
    if not data.is_dir():
        raise FileNotFoundError(f"no data folder {data}")
    if format == "folder":
        if root is not None:
            raise ValueError(
                f"root {root} (--root) does not go with the format 'folder', whose videos lie in {data}"
            )
        return _class_folders(Path(listing) if listing else data / subset, labels)
    if format not in LAYOUTS:
        raise ValueError(f"unknown data format {format!r}; known: {', '.join(layouts())}")
    train_pattern, val_pattern, videos = LAYOUTS[format]
    if listing is None:
        pattern = train_pattern if subset == "train" else val_pattern
        found = sorted(data.glob(pattern))
        if len(found) != 1:
            what = "none" if not found else f"{len(found)}: {', '.join(f.name for f in found)}"
            raise FileNotFoundError(
                f"{data}: expected one {pattern} ({format} layout), found {what}; "
                f"name the file with --{subset}-list"
            )
        listing = found[0]
    if root is None:
        root = data / videos.format(subset=subset)
        if not root.is_dir():
            root = data
    if labels is None and (data / "labels.txt").is_file() and format == "tsn":
        labels = data / "labels.txt"
    split = {"egogesture": subset, "hmdb51": "train" if subset == "train" else "test"}.get(format, "train")
    return read_annotations(listing, format, root=root, labels=labels, subset=split)


def _class_folders(folder: Path, labels: Sequence[str] | str | Path | None) -> tuple[list[Record], list[str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with one folder of videos for each class")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path))
    if isinstance(labels, str | Path):
        labels = read_labels(labels)
    names = list(labels) if labels is not None else classes
    if unknown := [name for name in classes if name not in names]:
        raise ValueError(f"{folder}: the folder {unknown[0]!r} is none of the {len(names)} classes")
    records: list[Record] = []
    others, empty = [], []
    for name in classes:
        before = len(records)
        for path in sorted(path for path in (folder / name).iterdir() if not _hidden(path)):
            if path.is_dir() or path.suffix.lower() in VIDEOS:
                records.append(Record(path, names.index(name)))
            else:
                others.append(path.suffix.lower() or path.name)
        if len(records) == before:
            empty.append(name)
    if others:
        endings = ", ".join(sorted(set(others)))
        logger.warning(
            "%s: %d files left out, whose endings are not those of videos: %s", folder, len(others), endings
        )
    if not records:
        raise ValueError(f"{folder}: no videos in its {len(classes)} class folders")
    if empty and labels is None:
        raise ValueError(
            f"{folder}: no videos in the class folder {empty[0]!r}: remove it, "
            "or give the class names (--labels)"
        )
    return records, names


def _hidden(path: Path) -> bool:
    """Whether a system or a program keeps its own data there, as in .DS_Store, @eaDir and __MACOSX."""
    return path.name.startswith((".", "@")) or path.name == "__MACOSX"


def train_dataset(
    records: Sequence[Record],
    config: ModelConfig,
    *,
    flip: str = "auto",
    on_error: str = "raise",
    seed: int = 0,
) -> VideoDataset:
    """The papers' training data: random segments' frames, multi-scale corner crops, flips.

    ``flip``: "none", "plain", "swap" as :func:`~temporal_excite.video.train_transform` takes them; "auto"
    is "swap" where class names speak of left and right, "none", with a warning, where all are numbers or
    codes ("7", "G05", "class_07"), which do not say, and "plain" elsewhere.
    """
    if flip == "auto":
        if flip_pairs(config.labels):
            flip = "swap"
        elif all(_CODE.fullmatch(name) for name in config.labels):
            logger.warning(
                "the class names are numbers or codes and do not say left or right: no clip is mirrored; "
                "--flip plain mirrors"
            )
            flip = "none"
        else:
            flip = "plain"
    transform = train_transform(
        config.crop,
        flip=flip,
        labels=config.labels,
        mean=config.mean,
        std=config.std,
        short_side=config.short_side,
    )
    sampler = SegmentSampler(config.n_segment, "train", short="spread")
    return VideoDataset(records, sampler, transform, on_error=on_error, labels=config.labels, seed=seed)


def test_dataset(
    records: Sequence[Record], config: ModelConfig, protocol: str = "1x1", *, on_error: str = "raise"
) -> VideoDataset:
    """The data of a test protocol, "CROPSxCLIPS": the centre crop, or three crops of the whole short side."""
    sampler, transform = protocol_views(config, protocol)
    return VideoDataset(records, sampler, transform, on_error=on_error, labels=config.labels)


def protocol_views(
    config: ModelConfig, protocol: str = "1x1"
) -> tuple[SegmentSampler, Callable[[Tensor, int], tuple[Tensor, int]]]:
    """What a test protocol takes of a video: its frames, and their crops."""
    crops, clips = parse_protocol(protocol)
    transform = test_transform(
        crops,
        size=config.crop if crops == 1 else config.short_side,
        short_side=config.short_side,
        mean=config.mean,
        std=config.std,
    )
    return SegmentSampler(config.n_segment, "test", clips), transform


test_dataset.__test__ = False  # type: ignore[attr-defined]  # a name pytest would collect

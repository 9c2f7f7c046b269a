"""Augmentation and test crops: transforms of (clip, label), with one random choice for all frames of a clip.

A transform is called as ``transform(clip, label)`` and returns both, the calling convention of
torchvision.transforms.v2, so its transforms and these mix freely in a ``v2.Compose``; the label takes part
because a mirrored "left" is a "right". ``clip`` is a uint8 ``tv_tensors.Video`` ``(T, 3, H, W)`` until
:class:`Normalise`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..ops import positive_int

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MIRRORED = {
    "left": "right",
    "right": "left",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
    "cw": "ccw",
    "ccw": "cw",
    "l": "r",
    "r": "l",
}
_MIRRORED_WORDS = [word for word in _MIRRORED if len(word) > 1]
# "pulling it right out" (Something-Something) is no direction
_MIRRORED_WORD = re.compile(
    r"(?<![a-z])(" + "|".join(_MIRRORED_WORDS) + r")(?=wards?(?![a-z])|(?![a-z]))(?! out\b)"
)
# in "SWIPELEFT" and "swipe_L": where another class is named as the mirror image would be
_MIRRORED_PART = re.compile(r"counterclockwise|clockwise|left|right|(?<![a-z])[lr](?![a-z])")
_WORD_BREAK = re.compile(r"_|(?<=[a-z])(?=[A-Z])")  # "swipe_left" and "SwipeLeft" are two words
_COUNTERCLOCKWISE = re.compile(r"\b(counter|anti)[- ]?clockwise\b")


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, on the scale 0 to 1, of a timm model's pretraining (``pretrained_cfg``).

    ``model`` may be the timm model itself, or a module that holds it. Raises ``ValueError`` when no part has
    one.
    """
    for part in model.modules():
        config = getattr(part, "pretrained_cfg", None)
        if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
            return tuple(config["mean"]), tuple(config["std"])
    raise ValueError(
        f"{type(model).__name__} holds no timm model with a pretrained_cfg: give mean and std yourself"
    )


def flip_pairs(labels: Sequence[str]) -> dict[int, int | None]:
    """What a mirrored clip of each class shows: ``{class: class of the mirror image, or None}``.

    Only classes that change are in it. They are found by name: "left" and "right", "clockwise" and
    "counterclockwise" (or "counter-clockwise", "anticlockwise") change places, whole words ("swipe_left",
    "SwipeLeft" and "leftward" hold one), in any case; "right out" is no direction. A class whose mirrored
    name is not among the labels gets ``None`` and must not be flipped. Parts of words ("SWIPELEFT") and the
    single letters of "swipe_L" and "swipe_R" count where both classes are among the labels.

    In Something-Something V1 and V2 this finds pulling (86, 87) and pushing (93, 94) "from left to right" /
    "from right to left" and turning the camera left / right (166, 167); in Jester (official, alphabetical
    numbering) sliding two fingers (11, 12), swiping (16, 17) and turning the hand clockwise /
    counterclockwise (21, 22).

    >>> flip_pairs(["Swiping Left", "Swiping Right", "Stop Sign", "Thumb Left"])
    {0: 1, 1: 0, 3: None}
    """
    words = (_WORD_BREAK.sub(" ", name).lower() for name in labels)
    names = [_COUNTERCLOCKWISE.sub("counterclockwise", name) for name in words]
    number = {name: i for i, name in enumerate(names)}
    pairs = {}
    for i, name in enumerate(names):
        mirrored = _MIRRORED_WORD.sub(lambda match: _MIRRORED[match[0]], name)
        if mirrored != name:
            pairs[i] = number.get(mirrored)
            continue
        mirrored = _MIRRORED_PART.sub(lambda match: _MIRRORED[match[0]], name)
        if mirrored != name and mirrored in number:
            pairs[i] = number[mirrored]
    return pairs


class MultiScaleCornerCrop(nn.Module):
    """A crop of random size, shape and place, resized to ``size`` x ``size`` (TSN, Sec. 3.2, "scale
    jittering" and "corner cropping").

    Width and height are ``scales[i]`` and ``scales[j]`` times the short side, with ``|i - j| <=
    max_distort``, one of these pairs at random. The place is one of 13: the corners, the centre, the middles
    of the edges, and the four points half-way between centre and corners, in steps of a quarter of the free
    space.
    """

    PLACES = (
        *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
        *((0, 2), (4, 2), (2, 4), (2, 0)),
        *((1, 1), (3, 1), (1, 3), (3, 3)),
    )

    def __init__(
        self, size: int = 224, scales: Sequence[float] = (1, 0.875, 0.75, 0.66), max_distort: int = 1
    ) -> None:
        super().__init__()
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"scales must lie in (0, 1], got {tuple(scales)}")
        self.size = positive_int("size", size)
        n = range(len(scales))
        self.pairs = [(scales[i], scales[j]) for i in n for j in n if abs(i - j) <= max_distort]

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """All crops (top, left, height, width) of a ``height`` x ``width`` picture, all equally likely."""
        short = min(height, width)
        sizes = [(max(1, int(short * a)), max(1, int(short * b))) for a, b in self.pairs]
        return [
            ((height - h) // 4 * down, (width - w) // 4 * right, h, w)
            for w, h in sizes
            for right, down in self.PLACES
        ]

    def forward(self, clip: Tensor, label: Any) -> tuple[Tensor, Any]:
        boxes = self.boxes(*clip.shape[-2:])
        box = boxes[int(torch.randint(len(boxes), ()))]
        return F.resized_crop(clip, *box, size=[self.size, self.size], antialias=True), label


class RandomFlip(nn.Module):
    """Mirrors a clip left to right with probability ``p`` and gives it the label of what it then shows.

    ``pairs`` as from :func:`flip_pairs`; a class mapped to ``None`` is never mirrored, one not in it keeps
    its label.
    """

    def __init__(self, pairs: Mapping[int, int | None] | None = None, p: float = 0.5) -> None:
        super().__init__()
        self.pairs = dict(pairs or {})
        self.p = p

    def forward(self, clip: Tensor, label: int) -> tuple[Tensor, int]:
        # drawn in any case: the choices after it do not depend on the label
        flip = float(torch.rand(())) < self.p
        mirrored = self.pairs.get(label, label)
        if not flip or mirrored is None:
            return clip, label
        return F.horizontal_flip(clip), mirrored


class ThreeCrop(nn.Module):
    """``size`` x ``size`` crops at the start, middle and end of the long side: ``(3, T, 3, size, size)``."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.size = positive_int("size", size)

    def forward(self, clip: Tensor, label: Any) -> tuple[Tensor, Any]:
        height, width = clip.shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(f"crops of {self.size} from frames of {height}x{width}: use a larger short_side")
        crops = []
        for third in range(3):
            down, right = (third, 1) if height > width else (1, third)
            top, left = (height - self.size) * down // 2, (width - self.size) * right // 2
            crops.append(F.crop(clip, top, left, self.size, self.size))
        return torch.stack([crop.as_subclass(Tensor) for crop in crops]), label


class Normalise(nn.Module):
    """uint8 to float32 with ``(v / 255 - mean) / std`` for each channel, any leading dimensions."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")
        self.mean, self.std = list(mean), list(std)

    def forward(self, clip: Tensor, label: Any) -> tuple[Tensor, Any]:
        clip = F.to_dtype(clip, torch.float32, scale=True)
        return F.normalize(clip, self.mean, self.std, inplace=True), label


def train_transform(
    size: int = 224,
    *,
    flip: str = "none",
    labels: Sequence[str] | None = None,
    pairs: Mapping[int, int | None] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    short_side: int | None = 256,
    scales: Sequence[float] = (1, 0.875, 0.75, 0.66),
) -> Callable[[Tensor, int], tuple[Tensor, int]]:
    """The papers' augmentation: short side 256, multi-scale corner crop, mirroring, normalisation.

    Args:
        size: side of the crops.
        flip: ``"none"`` never mirrors (what the released code does on data sets with directions), ``"plain"``
            mirrors half of the clips and keeps their labels, ``"swap"`` mirrors half of them and changes the
            labels by ``pairs``, or by :func:`flip_pairs` of ``labels``.
        labels: the class names, for ``"swap"``.
        pairs: as :func:`flip_pairs` returns them, for ``"swap"``.
        mean: as :func:`normalisation` gives it.
        std: as :func:`normalisation` gives it.
        short_side: of the frames before cropping; None leaves out this resize, which is cheaper for frames
            that are already small (the crops are relative to the short side either way).
        scales: see :class:`MultiScaleCornerCrop`.

    Shape:
        ``(T, 3, H, W)`` uint8 -> ``(T, 3, size, size)`` float32.

    Raises:
        ValueError: an unknown ``flip``, ``"swap"`` without classes to swap, or a value out of range.
    """
    if flip not in ("none", "plain", "swap"):
        raise ValueError(f"flip must be 'none', 'plain' or 'swap', got {flip!r}")
    steps: list[nn.Module] = [] if short_side is None else [v2.Resize(short_side, antialias=True)]
    steps.append(MultiScaleCornerCrop(size, scales))
    if flip == "swap":
        if pairs is None:
            if labels is None:
                raise ValueError(
                    "flip='swap' needs the class names (labels=) or the pairs of classes (pairs=)"
                )
            pairs = flip_pairs(labels)
            if not pairs:
                raise ValueError(
                    f"no name of the {len(labels)} classes says left, right, clockwise or counterclockwise: "
                    "use flip='plain' if no class has a direction, or give pairs={class: mirrored class}"
                )
        steps.append(RandomFlip(pairs))
    elif flip == "plain":
        steps.append(RandomFlip())
    return v2.Compose([*steps, Normalise(mean, std)])


def test_transform(
    crops: int = 1,
    *,
    size: int | None = None,
    short_side: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Tensor, int], tuple[Tensor, int]]:
    """The test protocols: short side 256, then the centre crop of 224 (``crops=1``) or three of 256 (``3``).

    Args:
        crops: 1 or 3.
        size: side of the crops; None: 224 for one crop, 256 for three.
        short_side: of the frames before cropping.
        mean: as :func:`normalisation` gives it.
        std: as :func:`normalisation` gives it.

    Shape:
        ``(T, 3, H, W)`` uint8 -> ``(T, 3, size, size)`` float32; with three crops ``(3, T, 3, size, size)``.

    Raises:
        ValueError: another number of crops, or a ``size`` above ``short_side``.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {crops!r}")
    if size is None:
        size = 224 if crops == 1 else 256
    if positive_int("size", size) > short_side:
        raise ValueError(f"crops of {size} from frames with a short side of {short_side}: raise short_side")
    crop = v2.CenterCrop(size) if crops == 1 else ThreeCrop(size)
    return v2.Compose([v2.Resize(short_side, antialias=True), crop, Normalise(mean, std)])


test_transform.__test__ = False  # type: ignore[attr-defined]  # a name pytest would collect

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import temporal_excite as te
from temporal_excite.video import flip_pairs, normalisation, test_transform, train_transform
from temporal_excite.video.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MultiScaleCornerCrop,
    Normalise,
    RandomFlip,
    ThreeCrop,
)


def coordinates(height, width, frames=3):
    """A clip whose first two channels are the row and the column."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([y, x, torch.zeros_like(x)]).to(torch.uint8)
    return tv_tensors.Video(picture.expand(frames, -1, -1, -1).clone())


def test_corner_crops():
    crop = MultiScaleCornerCrop(224)
    height, width = 256, 340
    boxes = crop.boxes(height, width)
    sides = [256, 224, 192, 168]
    neighbours = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert len(neighbours) == 10 and len(boxes) == 130
    for h, w in neighbours:
        places = {(top, left) for top, left, *size in boxes if size == [h, w]}
        down, right = (height - h) // 4, (width - w) // 4
        # the corners, centre and middles of the edges, and the four points half-way to the corners
        even = {(i * down, j * right) for i in (0, 2, 4) for j in (0, 2, 4)}
        odd = {(i * down, j * right) for i in (1, 3) for j in (1, 3)}
        assert places == even | odd
        assert len(places) == (13 if down else 5)  # no room up and down: some places coincide
        assert all(top + h <= height and left + w <= width for top, left in places)
    assert {(h, w) for *_, h, w in MultiScaleCornerCrop(max_distort=0).boxes(100, 80)} == {
        (side, side) for side in (80, 70, 60, 52)
    }
    assert len({(h, w) for *_, h, w in MultiScaleCornerCrop(max_distort=3).boxes(100, 80)}) == 16
    for scales in ((), (0,), (1.1,)):
        with pytest.raises(ValueError, match=r"scales must lie in \(0, 1\]"):
            MultiScaleCornerCrop(scales=scales)


def test_corner_crops_are_drawn_evenly_and_cut_where_they_say():
    torch.manual_seed(0)
    crop = MultiScaleCornerCrop(16, scales=(0.5,))
    clip = coordinates(32, 48)
    drawn = Counter()
    for _ in range(1300):
        got, label = crop(clip, 7)
        assert got.shape == (3, 3, 16, 16) and label == 7
        top, left = int(got[0, 0, 0, 0]), int(got[0, 1, 0, 0])
        assert torch.equal(got, clip[:, :, top : top + 16, left : left + 16])
        drawn[top, left] += 1
    assert drawn.keys() == {(top, left) for top, left, *_ in crop.boxes(32, 48)} and len(drawn) == 13
    assert all(60 < n < 145 for n in drawn.values())  # 100 each, within 4.5 standard deviations


@pytest.mark.parametrize("flip", ["none", "plain", "swap"])
def test_one_random_choice_for_all_frames(flip):
    frame = torch.randint(256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = tv_tensors.Video(frame.expand(5, -1, -1, -1).clone())
    transform = train_transform(32, flip=flip, labels=["go left", "go right"], short_side=36)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        got, label = transform(clip, 0)
        assert got.shape == (5, 3, 32, 32) and got.dtype == torch.float32
        assert torch.equal(got, got[:1].expand_as(got))
        seen.add((float(got.sum()), label))
    assert len(seen) > 10
    assert {label for _, label in seen} == ({0, 1} if flip == "swap" else {0})


@pytest.mark.parametrize(
    ("height", "width", "places"),
    [
        (32, 50, [(0, 0), (0, 9), (0, 18)]),  # left, centre, right
        (51, 32, [(0, 0), (9, 0), (19, 0)]),  # top, middle, bottom
        (32, 32, [(0, 0)] * 3),
        (36, 96, [(2, 0), (2, 32), (2, 64)]),
    ],
)
def test_three_crops(height, width, places):
    clip = coordinates(height, width)
    got, label = ThreeCrop(32)(clip, 5)
    assert got.shape == (3, 3, 3, 32, 32) and label == 5
    for view, (top, left) in zip(got, places, strict=True):
        assert torch.equal(view, clip[:, :, top : top + 32, left : left + 32])
    covered = torch.zeros(height, width, dtype=torch.bool)
    for top, left in places:
        covered[top : top + 32, left : left + 32] = True
    assert covered.any(0).all() if width >= height else covered.any(1).all()  # the long side, all of it


def test_test_transform():
    clip = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = tv_tensors.Video(clip)
    resized = v2.functional.resize(clip, [32], antialias=True)
    assert resized.shape == (2, 3, 32, 48)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    def plain(part):
        return (part.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    views, _ = test_transform(3, size=32, short_side=32, mean=mean, std=std)(clip, 0)
    for view, left in zip(views, (0, 8, 16), strict=True):
        torch.testing.assert_close(view.double(), plain(resized[..., left : left + 32]), atol=1e-5, rtol=0)
    centre, _ = test_transform(size=24, short_side=32, mean=mean, std=std)(clip, 0)
    torch.testing.assert_close(centre.double(), plain(resized[..., 4:28, 12:36]), atol=1e-5, rtol=0)
    defaults = [test_transform(crops)(clip, 0)[0].shape for crops in (1, 3)]
    assert defaults == [(2, 3, 224, 224), (3, 2, 3, 256, 256)]


def test_bad_transforms_are_named():
    with pytest.raises(ValueError, match="crops of 32 from frames of 31x50"):
        ThreeCrop(32)(coordinates(31, 50), 0)
    with pytest.raises(ValueError, match="crops must be 1 or 3, got 10"):
        test_transform(10)
    with pytest.raises(ValueError, match="crops of 256 from frames with a short side of 240"):
        test_transform(3, short_side=240)
    with pytest.raises(ValueError, match="flip must be 'none', 'plain' or 'swap', got 'yes'"):
        train_transform(flip="yes")
    with pytest.raises(ValueError, match="needs the class names"):
        train_transform(flip="swap")
    with pytest.raises(ValueError, match="no name of the 2 classes says left"):
        train_transform(flip="swap", labels=["up", "down"])
    with pytest.raises(ValueError, match="three numbers each, std above 0"):
        Normalise(std=(1, 1, 0))


def test_normalisation_of_a_model():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    assert normalisation(model) == ((0.5,) * 3, (0.5,) * 3)
    wrapped = te.VideoClassifier(
        te.inject(timm.create_model("resnet18", num_classes=3), "tsm", n_segment=2), 2
    )
    assert normalisation(wrapped) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = normalisation(timm.create_model("bninception"))
    assert mean == (104 / 255, 117 / 255, 128 / 255) and std == (1 / 255,) * 3
    got, _ = Normalise(mean, std)(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8), 0)
    torch.testing.assert_close(got.flatten(), torch.tensor([24.0, 11.0, 0.0]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="Linear holds no timm model with a pretrained_cfg"):
        normalisation(nn.Linear(1, 1))


def named(count, **numbers):
    """``count`` class names, those given at their numbers."""
    given = {int(number[1:]): name for number, name in numbers.items()}
    return [given.get(i, f"class{chr(97 + i // 26)}{chr(97 + i % 26)}") for i in range(count)]


def test_flip_pairs_of_the_data_sets():
    something = named(  # Something-Something, V1 and V2: numbers of the official label files
        174,
        _21="Laying something on the table on its side, not upright",
        _50="Plugging something into something but pulling it right out as you remove your hand",
        _86="Pulling something from left to right",
        _87="Pulling something from right to left",
        _93="Pushing something from left to right",
        _94="Pushing something from right to left",
        _56="Poking something so lightly that it doesn't or almost doesn't move",
        _119="Putting something upright on the table",
        _166="Turning the camera left while filming something",
        _167="Turning the camera right while filming something",
    )
    assert flip_pairs(something) == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    jester = named(
        27,
        _11="Sliding Two Fingers Left",
        _12="Sliding Two Fingers Right",
        _16="Swiping Left",
        _17="Swiping Right",
        _19="Thumb Down",
        _21="Turning Hand Clockwise",
        _22="Turning Hand Counterclockwise",
    )
    assert flip_pairs(jester) == {11: 12, 12: 11, 16: 17, 17: 16, 21: 22, 22: 21}
    assert flip_pairs(["Rotate fists counter-clockwise", "Rotate fists clockwise"]) == {0: 1, 1: 0}
    assert flip_pairs(["turn anticlockwise", "Turn Clockwise"]) == {0: 1, 1: 0}
    assert flip_pairs(["Swiping Left", "Swiping Up"]) == {0: None}


def test_flips_change_the_label():
    pairs = flip_pairs(["Swiping Left", "Swiping Right", "Stop Sign", "Looking Left"])
    assert pairs == {0: 1, 1: 0, 3: None}
    clip = torch.arange(4 * 3 * 2 * 5, dtype=torch.uint8).reshape(4, 3, 2, 5)
    for label, mirrored in ((0, 1), (1, 0), (2, 2), (3, 3)):
        got, new = RandomFlip(pairs, p=1)(clip, label)
        assert new == mirrored
        assert torch.equal(got, clip if label == 3 else clip.flip(-1))
        got, new = RandomFlip(pairs, p=0)(clip, label)
        assert new == label and torch.equal(got, clip)
    torch.manual_seed(0)
    flipped = sum(RandomFlip(pairs)(clip, 0)[1] for _ in range(400))
    assert 150 < flipped < 250


def test_train_transform_resizes_and_mirrors():
    clip = tv_tensors.Video(torch.arange(64, dtype=torch.uint8).expand(2, 3, 32, 64).clone())
    whole = train_transform(16, flip="plain", short_side=16, scales=(1,), mean=(0,) * 3, std=(1,) * 3)
    torch.manual_seed(0)
    rising = [bool(whole(clip, 0)[0][0, 0, 0].diff().mean() > 0) for _ in range(20)]
    assert {True, False} == set(rising)
    swap = train_transform(16, flip="swap", pairs={0: 5}, labels=["left", "right"])
    assert {swap(clip, 0)[1] for _ in range(20)} == {0, 5}


def test_default_short_side():
    first = train_transform(16).transforms[0]
    assert isinstance(first, v2.Resize) and first.size == [256]


def test_normalise_needs_three():
    with pytest.raises(ValueError, match="three numbers each"):
        Normalise(mean=(0.5,))


def test_separated_counter_clockwise():
    assert flip_pairs(["turn counter clockwise", "turn clockwise"]) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (["swipe_left", "swipe_right"], {0: 1, 1: 0}),
        (["SwipeLeft", "SwipeRight"], {0: 1, 1: 0}),
        (["leftward", "rightwards", "rightward"], {0: 2, 1: None, 2: 0}),
        (["left1", "right1"], {0: 1, 1: 0}),
        (["turn_counter_clockwise", "turn_clockwise"], {0: 1, 1: 0}),
        (["turn_cw", "turn_ccw"], {0: 1, 1: 0}),
        (["SWIPELEFT", "SWIPERIGHT", "lefthand", "righthand"], {0: 1, 1: 0, 2: 3, 3: 2}),
        (["swipe_L", "swipe_R", "grade r", "walk"], {0: 1, 1: 0}),
        (["upright", "brightness", "cleft", "leftover", "pull_right_out"], {}),
    ],
    ids=str,
)
def test_words_in_names_of_folders(labels, pairs):
    assert flip_pairs(labels) == pairs

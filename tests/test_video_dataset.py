import pytest
import torch
from torch.utils.data import DataLoader
from video_clips import write_folder

from temporal_excite.video import (
    AnnotationError,
    Record,
    SegmentSampler,
    VideoDataset,
    VideoError,
    flip_pairs,
    read_annotations,
    test_transform,
    train_transform,
)
from temporal_excite.video.transforms import RandomFlip


@pytest.fixture
def records(tmp_path):
    return [Record(write_folder(tmp_path / f"clip{i}"), i % 2) for i in range(4)]


def test_items_depend_on_seed_epoch_and_index_only(records):
    dataset = VideoDataset(records, SegmentSampler(4), train_transform(32, flip="plain"))
    first = [dataset[i][0] for i in range(4)]
    loader = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    assert torch.equal(next(iter(loader))[0], torch.stack(first))
    dataset.set_epoch(1)
    second = torch.stack([dataset[i][0] for i in range(4)])
    assert not torch.equal(second, torch.stack(first))
    assert torch.equal(next(iter(loader))[0], second)  # reaches running workers


def test_views(records):
    sampler = SegmentSampler(4, "test", 2)
    clip, label = VideoDataset(records, sampler, test_transform(3, size=32, short_side=32))[1]
    assert clip.shape == (6, 4, 3, 32, 32) and label == 1
    clip, _ = VideoDataset(records, SegmentSampler(4, "test"), test_transform(size=32, short_side=40))[1]
    assert clip.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_videos_raise_or_are_replaced_and_counted(records, workers):
    (records[2].path / "00003.jpg").write_bytes(b"")
    records.append(Record(records[0].path.with_name("gone"), 0))
    sampler, transform = SegmentSampler(12), test_transform(size=32, short_side=32)
    strict = VideoDataset(records, sampler, transform)
    with pytest.raises(VideoError, match="clip2/00003"):
        strict[2]
    with pytest.raises(VideoError, match="gone: no such file"):
        strict[4]
    dataset = VideoDataset(records, sampler, transform, on_error="skip")
    batches = [x for _ in range(2) for x, _ in DataLoader(dataset, batch_size=5, num_workers=workers)]
    assert torch.equal(*batches) and batches[0].std(dim=(1, 2, 3, 4)).min() > 0
    assert dataset.broken == [2, 4] and dataset.errors == 2


def test_nothing_readable_ends_with_an_error(tmp_path):
    dataset = VideoDataset([Record(tmp_path / "gone", 0)], SegmentSampler(4), on_error="skip")
    with pytest.raises(RuntimeError, match="no readable video in 100 tries"):
        dataset[0]


def test_flips_change_the_label():
    pairs = flip_pairs(["Swiping Left", "Swiping Right", "Stop Sign", "Looking Left"])
    assert pairs == {0: 1, 1: 0, 3: None}
    clip = torch.arange(4 * 3 * 2 * 5, dtype=torch.uint8).reshape(4, 3, 2, 5)
    for label, mirrored in ((0, 1), (1, 0), (2, 2), (3, 3)):
        got, new = RandomFlip(pairs, p=1)(clip, label)
        assert new == mirrored
        assert torch.equal(got, clip if label == 3 else clip.flip(-1))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a 5 0\nb 5\n", "2: expected"),
        ("a 5 -1\n", "1: label -1"),
        ("a 5 0\nb 3 9 7\n", "2: label 7 out of range"),
    ],
)
def test_wrong_lines_are_named(text, problem, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(AnnotationError, match=f"list.txt:{problem}"):
        read_annotations(file, labels=["x", "y"])


def test_list_formats(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a b/c 5 9 1\n\nd 1 1 0\n")
    assert read_annotations(file) == (
        [Record(tmp_path / "a b/c", 1, 4, 5), Record(tmp_path / "d", 0, 0, 1)],
        ["0", "1"],
    )
    file.write_text("7;Swiping Left\n8;Stop\n")
    (tmp_path / "labels.csv").write_text("Stop\nSwiping Left\n")
    got, labels = read_annotations(file, "jester")
    assert [r.label for r in got] == [1, 0] and labels == ["Stop", "Swiping Left"]

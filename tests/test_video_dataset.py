import logging
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from video_clips import decode_all, number_of, write_folder, write_padded_video, write_video

from temporal_excite.video import (
    Record,
    SegmentSampler,
    VideoDataset,
    VideoError,
    test_transform,
    train_transform,
)


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


def test_a_video_shorter_than_announced_is_sampled_over_its_frames(tmp_path, caplog):
    path = write_padded_video(tmp_path / "v.avi", 40, [40] * 8)
    shown = [number_of(frame) for frame in decode_all(path)]
    count = len(shown)
    sampler = SegmentSampler(4, "test", 2)
    assert not torch.equal(sampler(count), sampler(48))
    caplog.set_level(logging.INFO)
    clips, _ = VideoDataset([Record(path, 0)], sampler)[0]
    numbers = [number_of(frame.permute(1, 2, 0).numpy()) for frame in clips.flatten(0, 1)]
    assert numbers == [shown[i] for i in sampler(count).flatten()]
    assert re.search(rf"v\.avi: holds {count} frames where its container announces 48", caplog.text)
    clip, _ = VideoDataset([Record(path, 0, start=10, num_frames=30)], SegmentSampler(30, "test"))[0]
    assert [number_of(frame.permute(1, 2, 0).numpy()) for frame in clip] == list(range(10, 40))
    for record in (Record(path, 0, num_frames=48), Record(path, 0, start=45)):
        with pytest.raises(VideoError, match=rf"v\.avi: has {count} frames, the record takes"):
            VideoDataset([record], sampler)[0]


def test_frames_and_crops_are_drawn_independently(records):
    """One seed for both would tie the first frame's place to the first number the transform draws."""
    drawn = []
    dataset = VideoDataset(
        records[:1],
        SegmentSampler(1),
        lambda clip, label: (drawn.append(torch.randint(12, ())), (clip, label))[1],
    )
    state = torch.random.get_rng_state()
    frames = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        frames.append(number_of(dataset[0][0][0].permute(1, 2, 0).numpy()))
    assert frames != [int(number) for number in drawn]
    assert len(set(frames)) > 4 and len({int(number) for number in drawn}) > 4
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_the_example_of_the_docs_runs_as_written(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parent.parent / "docs" / "data.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "videos" / "folder")
    write_video(tmp_path / "videos" / "file.mp4", 12)
    Path("train.txt").write_text("folder 0\nfile.mp4 1\ngone.mp4 1\n")
    names: dict = {}
    exec(example, names)
    assert names["clips"].shape == (3, 8, 3, 224, 224) and names["targets"].shape == (3,)
    assert capsys.readouterr().out == "1 unreadable videos: ['videos/gone.mp4']\n"


def test_the_commands_of_the_docs_run(tmp_path, monkeypatch, capsys):
    import decoding

    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    commands = [
        line.split()[2:] for line in page.splitlines() if line.startswith("    python benchmarks/decoding.py")
    ]
    assert commands == [[], ["clip.mp4", "folder_of_frames"]]
    write_video(tmp_path / "clip.mp4", 12)
    write_folder(tmp_path / "folder_of_frames")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoding, "readers", lambda: {"seek": decoding.seek, "decode": decoding.decode})
    for paths in commands:
        monkeypatch.setattr("sys.argv", ["decoding.py", *paths, "--repeats", "1"])
        decoding.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "fails" not in line]
    read = [(row[0], row[1], row[2], row[-1]) for row in rows if row[0] != "file" and row[1].isdigit()]
    assert read == [
        *(
            (name, "300", reader, "yes")
            for name in ("h264.mp4", "mpeg4_b_frames.avi")
            for reader in ("seek", "decode")
        ),
        *(("clip.mp4", "12", reader, "yes") for reader in ("seek", "decode")),
        ("folder_of_frames", "12", "seek", "-"),
    ]


def test_arguments(tmp_path):
    records = [Record(write_folder(tmp_path / f"c{i}"), i) for i in range(2)]
    sampler = SegmentSampler(2, "test")
    with pytest.raises(ValueError, match="no records"):
        VideoDataset([], sampler)
    with pytest.raises(ValueError, match="on_error must be"):
        VideoDataset(records, sampler, on_error="x")
    with pytest.raises(ValueError, match=r"c1: label 1 is not in 0 \.\. 0"):
        VideoDataset(records, sampler, labels=["a"])
    with pytest.raises(ValueError, match=r"keep=True needs a sampler .* mode='train'"):
        VideoDataset(records, SegmentSampler(2), keep=True)
    dataset = VideoDataset(records, sampler, keep=True)
    assert torch.equal(dataset[-1][0], dataset[1][0])
    for index in (2, -3):
        with pytest.raises(IndexError, match="data set of 2 videos"):
            dataset[index]


def test_seed(records):
    def clips(seed):
        dataset = VideoDataset(records, SegmentSampler(2), seed=seed)
        for epoch in range(5):
            dataset.set_epoch(epoch)
            yield dataset[0][0]

    assert not torch.equal(torch.stack(list(clips(0))), torch.stack(list(clips(1))))


def test_swapped_labels_of_several_views(tmp_path):
    record = Record(write_folder(tmp_path / "c"), 0)
    dataset = VideoDataset([record], SegmentSampler(2, "test", 2), lambda clip, label: (clip, 1 - label))
    assert dataset[0][1] == 1


def test_record_that_is_back(records, tmp_path):
    away = tmp_path / "away"
    records[0].path.rename(away)
    dataset = VideoDataset(records, SegmentSampler(2, "test"), on_error="skip")
    dataset[0]
    assert dataset.broken == [0]
    away.rename(records[0].path)
    records[1].path.rename(away)
    for epoch in range(20):  # item 0 comes in the place of item 1
        dataset.set_epoch(epoch)
        dataset[1]
    assert dataset.broken == [0, 1]  # and was not asked for itself
    away.rename(records[1].path)
    dataset[0], dataset[1]
    assert dataset.broken == []

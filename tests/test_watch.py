"""``temporal-excite watch`` and what it is made of: frames in order, labels as they come, the overlay."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import fails
from video_clips import decode_all, number_of, picture, turn, write_folder, write_video

from temporal_excite.cli import main
from temporal_excite.training import ModelConfig, Recognizer, build_model, save_checkpoint
from temporal_excite.training.commands import keyword
from temporal_excite.video import VideoError, play, playing, read_frames

FRAMES = 6


def checkpoint(path: Path, module: str | None = "action", **module_args: object) -> Path:
    config = ModelConfig(
        backbone="resnet10t",
        module=module,
        labels=("one", "two", "three"),
        n_segment=FRAMES,
        module_args=module_args,
        backbone_args={"channels": [8, 8, 16, 16], "stem_width": 8},
        short_side=36,
        crop=32,
    )
    torch.manual_seed(0)
    model = build_model(config)
    model.reset_head(3, std=1.0)
    save_checkpoint(path, config, model.state_dict())
    return path


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "causal.pt", causal=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video file, and the folder of its frames."""
    folder = tmp_path_factory.mktemp("clips")
    video = write_video(folder / "clip.mp4", FRAMES)
    (folder / "pictures").mkdir()
    for i, frame in enumerate(decode_all(video)):
        Image.fromarray(frame).save(folder / "pictures" / f"{i:03d}.png")
    return video, folder / "pictures"


def watch(capsys, *arguments: object) -> list[dict]:
    """The lines of the command, and a summary behind them."""
    assert main(["watch", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err.startswith(f"{len(lines)} frames, ")
    return lines


def without_ms(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "ms"} for line in lines]


# ---- frames in order


def test_play_gives_what_decoding_gives(tmp_path):
    """B-frames, uneven time stamps, a turned picture."""
    times = [0, 3, 10, 11, 30, 31, 32, 50]
    video = write_video(tmp_path / "a.mp4", 8, times=times, max_b_frames=2)
    turn(video, (0, 1, -1, 0))
    with play(video) as frames:
        got = list(frames)
    assert [f.index for f in got] == list(range(8))
    assert [f.time for f in got] == pytest.approx([t / 100 for t in times])
    assert torch.equal(torch.stack([f.picture for f in got]), read_frames(video, range(8)))
    with play(write_folder(tmp_path / "b", 12), fps=10) as frames:
        assert frames.rate == 10
        for f in frames:
            assert number_of(f.picture.permute(1, 2, 0).numpy()) == f.index
            assert f.time == pytest.approx(f.index / 10)
    assert f.index == 11


def test_time_of_avi_with_b_frames(tmp_path):
    video = write_video(tmp_path / "a.avi", 12, options={"bf": "3", "x264-params": "b-adapt=0"})
    with play(video) as frames:
        got = list(frames)
    assert [number_of(f.picture.permute(1, 2, 0).numpy()) for f in got] == list(range(12))
    assert [f.time for f in got] == pytest.approx([i / 25 for i in range(12)])


def test_play_refuses(tmp_path):
    with pytest.raises(VideoError, match=r"none\.mp4: no such file or folder"):
        play(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4: not a readable video"):
        play(tmp_path / "text.mp4")
    for fps in (0, 1e-9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"fps must be from 0\.001 to 1000, got"):
            play(tmp_path, fps)
    folder = write_folder(tmp_path / "sizes", 2)
    Image.fromarray(picture(2, 40, 64)).save(folder / "00003.jpg")
    with pytest.raises(VideoError, match=r"\(48, 64\), then \(40, 64\) at frame 2"), play(folder) as frames:
        list(frames)


def test_camera(monkeypatch):
    """A generated picture source of FFmpeg stands for the camera."""
    monkeypatch.setattr(playing, "_camera", lambda number: ("testsrc=size=64x48:rate=25", "lavfi"))
    with play("0") as frames:
        got = list(itertools.islice(frames, 5))
    assert frames.rate == 25 and got[0].picture.shape == (3, 48, 64)
    assert [f.time for f in got] == pytest.approx([f.index / 25 for f in got])
    indices = [f.index for f in got]
    assert indices == sorted(set(indices))
    with play("0"):  # nothing read
        pass
    monkeypatch.setattr(playing, "_camera", lambda number: ("nullsrc=duration=0", "lavfi"))
    with pytest.raises(VideoError, match="no decodable frame"), play("0") as frames:
        list(frames)


def test_broken_frames(monkeypatch, tmp_path):
    """A camera is watched on, a file ends there; a camera that sends nothing else is given up."""
    video = write_video(tmp_path / "a.avi", 8, "mjpeg")
    with av.open(str(video)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = video.read_bytes()
    for number in 2, 3, 6:
        half = len(packets[number]) // 2
        content = content.replace(packets[number], packets[number][:half].ljust(len(packets[number]), b"\0"))
    video.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.avi: cannot be decoded after 2 frames"), play(video) as frames:
        list(frames)
    monkeypatch.setattr(playing, "_camera", lambda number: (str(video), "avi"))

    def watched(patience: int) -> list[int]:
        monkeypatch.setattr(playing, "_PATIENCE", patience)
        with play("0") as camera:
            return [number_of(f.picture.permute(1, 2, 0).numpy()) for f in camera._player]

    assert watched(2) == [0, 1, 4, 5, 7]
    with pytest.raises(VideoError, match="cannot be decoded after 2 frames"):
        watched(1)


def test_no_camera(causal, capsys):
    assert "no camera 987" in fails(capsys, "watch", causal, 987)


# ---- labels as they come


def test_timeline_is_that_of_whole_clips(causal, clip, capsys):
    video, folder = clip
    lines = watch(capsys, causal, video, "--window", 0)
    recognizer = Recognizer.from_checkpoint(causal)
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert [line["time"] for line in lines] == pytest.approx([i / 25 for i in range(FRAMES)])
    best = recognizer(video)
    assert lines[-1]["predictions"] == [[p.label, pytest.approx(p.score, abs=1e-5)] for p in best]
    # the logits of each frame of the whole clip, averaged as the window says
    pictures = read_frames(video, range(FRAMES))
    with torch.no_grad():
        logits = recognizer.model.model(recognizer._views(pictures, "1x1"))
    for window in (0, 2):
        lines = watch(capsys, causal, video, "--window", window)
        for t, line in enumerate(lines):
            wanted = logits[: t + 1][-window:].mean(0).softmax(0)
            scores = dict(line["predictions"])
            got = torch.tensor([scores[label] for label in recognizer.config.labels])
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert logits.std(0).min() > 1e-3  # frames differ
    assert without_ms(watch(capsys, causal, folder)) == without_ms(watch(capsys, causal, video))
    assert (
        watch(capsys, causal, video)[-1]["predictions"]
        == watch(capsys, causal, video, "--window", FRAMES)[-1]["predictions"]
    )


def test_every(causal, clip, tmp_path, capsys):
    video, _ = clip
    lines = watch(capsys, causal, video, "--every", 2, "--top", 1, "--overlay", tmp_path / "o.mkv")
    assert [line["frame"] for line in lines] == [0, 2, 4]
    assert all(len(line["predictions"]) == 1 for line in lines)
    (tmp_path / "third").mkdir()
    for i in (0, 2, 4):
        Image.fromarray(decode_all(video)[i]).save(tmp_path / "third" / f"{i // 2}.png")
    alone = watch(capsys, causal, tmp_path / "third", "--top", 1)
    assert [line["predictions"] for line in lines] == [line["predictions"] for line in alone]
    assert len(decode_all(tmp_path / "o.mkv")) == FRAMES


def test_network_without_temporal_modules(tmp_path, clip, capsys):
    lines = watch(capsys, checkpoint(tmp_path / "tsn.pt", None), clip[0])
    assert len(lines) == FRAMES


def test_text(causal, clip, capsys):
    assert main(["watch", str(causal), str(clip[0]), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == FRAMES and all(line.count("%") == 2 and " ms " in line for line in lines)
    assert lines[3].split()[:2] == ["0.12", "s"]


# ---- the overlay


def test_overlay(causal, clip, tmp_path, capsys):
    path = tmp_path / "overlay.mp4"
    watch(capsys, causal, clip[0], "--overlay", path, "--top", 1)
    frames, plain = decode_all(path), decode_all(clip[0])
    assert len(frames) == FRAMES and frames[0].shape == plain[0].shape
    for got, want in zip(frames, plain, strict=True):
        below = np.abs(got[-8:].astype(int) - want[-8:]).mean()
        text = np.abs(got[:24].astype(int) - want[:24]).mean()
        assert text > 20 > below
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / 25 for i in range(FRAMES)], abs=1e-3)


def test_overlay_of_odd_size(causal, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(picture(i, 49, 65)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    watch(capsys, causal, folder, "--overlay", "1:2.mov")
    (tmp_path / "1:2.mov").rename(tmp_path / "odd.mov")
    assert decode_all(tmp_path / "odd.mov")[1].shape == (48, 64, 3)


@pytest.mark.parametrize("error", ["picture", "interrupt", "terminate"])
def test_overlay_is_whole_after_an_error(causal, tmp_path, capsys, error, monkeypatch):
    folder = write_folder(tmp_path / "frames", 6)
    base = ["watch", str(causal), str(folder), "--overlay", str(tmp_path / "o.mp4")]
    if error == "picture":
        (folder / "00004.jpg").write_bytes(b"no picture")
        assert "00004.jpg" in fails(capsys, *base)
    else:
        read = playing.FrameFolder.read

        def interrupted(self, indices):
            if indices == [3]:
                os.kill(os.getpid(), signal.SIGINT if error == "interrupt" else signal.SIGTERM)
            return read(self, indices)

        monkeypatch.setattr(playing.FrameFolder, "read", interrupted)
        if error == "interrupt":
            # a job in a shell's background ignores it
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            assert main(base) == 130
            signal.signal(signal.SIGINT, before)
        else:
            with pytest.raises(SystemExit) as end:
                main(base)
            assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert capsys.readouterr().err.startswith("3 frames, ")
    assert len(decode_all(tmp_path / "o.mp4")) == 3


# ---- bad input: one line, code 2


def test_wrong_input(causal, clip, tmp_path, capsys):
    video, folder = clip
    assert "no checkpoint" in fails(capsys, "watch", tmp_path / "none.pt", video)
    assert "no such file or folder" in fails(capsys, "watch", causal, tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    assert "holds no numbered pictures" in fails(capsys, "watch", causal, tmp_path / "empty")
    for option in ("--every", "--top"):
        assert f"{option} must be at least 1, got 0" in fails(capsys, "watch", causal, video, option, 0)
    assert "window must be" in fails(capsys, "watch", causal, video, "--window", -1)
    assert "fps must be from 0.001 to 1000, got 0.0" in fails(capsys, "watch", causal, folder, "--fps", 0)
    for path, problem in (
        (tmp_path / "o.gif", "the ending must be one of .mp4, .mkv, .mov"),
        (tmp_path / "none" / "o.mp4", "there is no folder"),
        (video, "is the video to watch"),
    ):
        assert problem in fails(capsys, "watch", causal, video, "--overlay", path)
    (tmp_path / "folder.mp4").mkdir()
    assert "cannot write" in fails(capsys, "watch", causal, video, "--overlay", tmp_path / "folder.mp4")
    assert len(decode_all(video)) == FRAMES


def test_two_sided_checkpoint(tmp_path, clip, capsys):
    path = checkpoint(tmp_path / "two.pt")
    error = fails(capsys, "watch", path, clip[0])
    assert "two-sided" in error and "train --module-arg causal=True" in error
    with pytest.raises(ValueError, match="two-sided"):
        Recognizer.from_checkpoint(path).live()


def test_live_recognizer(causal, clip):
    recognizer = Recognizer.from_checkpoint(causal)
    live, pictures = recognizer.live(), read_frames(clip[0], range(FRAMES))
    first = [live(f) for f in pictures]
    assert [(p.label, pytest.approx(p.score, abs=1e-5)) for p in first[-1]] == [
        (p.label, p.score) for p in recognizer(pictures)
    ]
    live.reset()
    assert [live(f) for f in pictures] == first
    for wrong in (pictures[0].float(), pictures, pictures[0][:1]):
        with pytest.raises(ValueError, match="expected a uint8 frame"):
            live(wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("causal=True", True),
        ("causal=true", True),
        ("causal=FALSE", False),
        ("x=(2,3)", (2, 3)),
        ("x=a", "a"),
    ],
)
def test_module_arguments(text, value):
    assert keyword(text)[1] == value


def test_missing_reader_names_the_extra(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    for opened in (lambda: read_frames(video, [0]), lambda: play(str(video), 25)):
        with pytest.raises(ModuleNotFoundError, match=r"need av: pip install 'temporal-excite\[video\]'"):
            opened()

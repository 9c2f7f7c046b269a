"""The generated clips tell their class by the order of frames alone, and the benchmark runs end to end."""

import sys

import motion
import numpy as np
import pytest
import torch

from temporal_excite.training import ModelConfig, build_model
from temporal_excite.video import read_frames


def test_files_are_lossless_and_twins_share_their_frames(tmp_path):
    motion.write_dataset(tmp_path, "val", 2, seed=0)
    painter = motion.Painter(np.random.default_rng(0))
    for number in range(2):
        for pair in range(4):
            drawn = painter.clip(pair)
            one, two = (tmp_path / "val" / f"{pair}_{number:05d}_{r}.mp4" for r in (0, 1))
            assert one.stat().st_size > 500
            assert torch.equal(read_frames(one, range(8)), drawn)
            assert torch.equal(read_frames(two, range(8)), drawn.flip(0))
    before = (tmp_path / "val.txt").stat().st_mtime_ns
    motion.write_dataset(tmp_path, "val", 2, seed=0)
    assert (tmp_path / "val.txt").stat().st_mtime_ns == before


def test_every_clip_shows_a_change():
    painter = motion.Painter(np.random.default_rng(1))
    for pair in range(4):
        for _ in range(4):
            clip = painter.clip(pair).float() / 255
            moved = (clip - clip.flip(0)).abs().amax()  # far above the noise of 0.02
            assert moved > 0.2


def test_within_pairs_by_hand():
    scores = torch.tensor([[0.4, 0.1, 0.5], [0.3, 0.2, 0.5]])
    scores = torch.cat([scores, torch.zeros(2, 5)], dim=1)
    first, *others = motion.within_pairs(
        torch.cat([scores, torch.eye(8)[2:]]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    )
    assert first == 50 and others == [100, 100, 100]
    assert motion.within_pairs(torch.ones(8, 8), torch.arange(8)) == [50] * 4


@pytest.mark.parametrize("name", motion.CONTENDERS)
def test_only_networks_with_temporal_modules_see_the_order(name):
    contender = motion.CONTENDERS[name]
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="motion_net",
        module=contender.module,
        labels=motion.LABELS,
        dropout=0.0,
        module_args=contender.module_args,
        backbone_args={"block": contender.block},
    )
    model = build_model(config).eval().double()
    painter = motion.Painter(np.random.default_rng(2))
    clips = torch.stack([painter.clip(pair) for pair in range(4)]).double() / 255
    with torch.no_grad():
        model.model.fc.weight.normal_()
        difference = (model(clips) - model(clips.flip(1))).abs().amax().item()
    assert difference < 1e-12 if name == "tsn" else difference > 1e-7


def test_one_block_of_shift_cannot_tell_a_disc_from_a_plus_three_frames_later():
    """Receptive field 3: the time reverse of the fourth pair gives the same frame logits in another order."""
    painter = motion.Painter(np.random.default_rng(3))
    clip = painter.clip(3)
    quiet = clip.clone()
    quiet[[0, 1, 3, 4, 6, 7]] = clip[0]  # without the noise, which differs from frame to frame
    clips = torch.stack([quiet, quiet.flip(0)]).double() / 255
    logits = {}
    for name in ("tsm1", "tsm"):
        torch.manual_seed(0)
        contender = motion.CONTENDERS[name]
        config = ModelConfig("motion_net", contender.module, motion.LABELS, module_args=contender.module_args)
        with torch.no_grad():
            model = build_model(config).eval().double()
            model.model.fc.weight.normal_()
            logits[name] = model(clips)
    assert (logits["tsm1"][0] - logits["tsm1"][1]).abs().max() < 1e-9
    assert (logits["tsm"][0] - logits["tsm"][1]).abs().max() > 1e-6


def test_benchmark_smoke(tmp_path, monkeypatch, capsys):
    """A few steps of two contenders through the whole script: table, picture, and finished runs are kept."""
    arguments = [
        "motion.py",
        "--modules",
        "tsn",
        "action",
        "--steps",
        "6",
        "--clips",
        "4",
        "--test-clips",
        "2",
    ]
    arguments += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    motion.main()
    shown = capsys.readouterr().out
    assert "| TSN |" in shown and "| ACTION |" in shown
    results = motion.load_results(tmp_path / "out", ["action", "tsn"], [0])
    assert list(results) == ["tsn", "action"]
    tsn, action = results["tsn"][0], results["action"][0]
    assert tsn["forward"] == tsn["reversed"] == [50] * 4  # exactly, whatever it has learned
    assert tsn["steps"] == action["steps"] == 8 and action["parameters"] > tsn["parameters"]
    assert (tmp_path / "out" / "motion.png").stat().st_size > 20_000
    written = (tmp_path / "out" / "tsn-0.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", arguments)
    motion.main()
    assert (tmp_path / "out" / "tsn-0.json").stat().st_mtime_ns == written
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "9"])
    with pytest.raises(SystemExit):
        motion.main()
    assert "is of the budget [6, 8, 32, 16]" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--clips", "5"])
    with pytest.raises(ValueError, match="lists 32 clips, not 5 for each of 8 classes"):
        motion.main()

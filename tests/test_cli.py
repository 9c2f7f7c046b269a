"""The command line, end to end on generated frame folders, and the recogniser."""

import argparse
import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_excite.cli import COMMANDS, main
from temporal_excite.training import (
    ModelConfig,
    build_model,
    get_recipe,
    load_initial,
    read_checkpoint,
    read_log,
    save_checkpoint,
)
from temporal_excite.training.checkpoint import CheckpointError
from temporal_excite.training.commands.train import _changed, configure
from temporal_excite.training.evaluate import video_scores
from temporal_excite.training.recognizer import Recognizer

SMALL = [
    *("--backbone", "resnet10t", "--backbone-arg", "channels=[8,8,16,16]", "--backbone-arg", "stem_width=8"),
    *("--no-pretrained", "--n-segment", "2", "--short-side", "36", "--crop", "32", "--device", "cpu"),
    *("--batch-size", "2", "--workers", "0", "--no-progress", "--log-every", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of frame folders: bright and dark."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for subset, count in (("train", 4), ("val", 2)):
        for name, level in (("bright", 200), ("dark", 30)):
            for number in range(count):
                video = folder / subset / name / f"v{number}"
                video.mkdir(parents=True)
                for i in range(3):
                    picture = level + rng.integers(0, 20, (40, 48, 3))
                    Image.fromarray(picture.astype(np.uint8)).save(video / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["train", "--recipe", "jester", "--data", str(data), "--format", "folder", "--epochs", "3"]
    assert main([*arguments, "--output", str(output), "--lr", "0.02", "--dropout", "0", *SMALL]) == 0
    return output


def fails(capsys, *arguments: object) -> str:
    """The one-line error of a command that ends with code 2."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("temporal-excite ") and "error: " in error and "\n" not in error
    return error


def test_train_writes_checkpoints_and_log(trained):
    assert {p.name for p in trained.iterdir()} == {"last.pt", "best.pt", "log.jsonl"}
    config = read_checkpoint(trained / "best.pt")["config"]
    assert config.labels == ("bright", "dark") and config.module == "action" and config.dataset == "folder"
    assert config.mean == (0.485, 0.456, 0.406) and (config.n_segment, config.crop) == (2, 32)
    assert len(read_log(trained, "epoch")) == 3


def test_from_scratch_the_last_layer_starts_large_enough_to_learn(data, tmp_path):
    arguments = ["train", "--recipe", "jester", "--data", str(data), "--format", "folder", "--epochs", "1"]
    assert main([*arguments, "--output", str(tmp_path / "run"), "--lr", "1e-9", *SMALL]) == 0
    weights = read_checkpoint(tmp_path / "run" / "last.pt")["state_dict"]
    assert 0.03 < float(weights["model.fc.weight"].std()) < 0.07


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, (1,)), (2, (1, 2)), (3, (1, 2)), (15, (5, 10, 12)), (60, (20, 40, 50))]
)
def test_milestones_move_with_the_epochs(epochs, milestones):
    parser = argparse.ArgumentParser()
    configure(parser)
    args = parser.parse_args(["--recipe=jester", "--data=x", "--output=x", "--epochs", str(epochs)])
    assert _changed(get_recipe("jester"), args).milestones == milestones


def test_resume_of_a_finished_run_changes_nothing(trained, data):
    before = (trained / "last.pt").read_bytes()
    arguments = ["train", "--recipe", "jester", "--data", str(data), "--format", "folder", "--epochs", "3"]
    arguments += ["--output", str(trained), "--lr", "0.02", "--dropout", "0", *SMALL]
    assert main([*arguments, "--resume"]) == 0
    assert (trained / "last.pt").read_bytes() == before


@pytest.mark.parametrize(("protocol", "views"), [("1x1", 1), ("3x2", 6)])
def test_evaluate(trained, data, tmp_path, capsys, monkeypatch, protocol, views):
    module, read = sys.modules["temporal_excite.training.evaluate"], []

    def scores(model, clips, limit):
        read.append(len(clips))
        return video_scores(model, clips, limit)

    monkeypatch.setattr(module, "video_scores", scores)
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("of another")
    arguments = ["evaluate", trained / "best.pt", "--data", data, "--protocol", protocol, "--output", output]
    assert main([str(a) for a in (*arguments, "--workers", 0, "--no-progress", "--device", "cpu")]) == 0
    shown = capsys.readouterr().out
    assert read == ([4] if views == 1 else [2, 2])  # 16 clips at most
    assert f"wrote confusion.png, predictions.csv, result.json to {output}" in shown
    result = json.loads((output / "result.json").read_text())
    assert f"Top-1 {result['top1']:.2f} %" in shown and f"x {views} = " in shown
    assert result["gflops_per_video"] == pytest.approx(views * result["gflops_per_view"])
    side = 32 if views == 1 else 36
    config = read_checkpoint(trained / "best.pt")["config"]
    from temporal_excite.complexity import count

    assert result["gflops_per_view"] * 1e9 == count(build_model(config), (2, 3, side, side)).flops
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["videos"] == 4
    right = sum(row["label"] == row["prediction1"] for row in rows)
    assert result["top1"] == 100 * right / 4
    assert all(float(r["score1"]) + float(r["score2"]) == pytest.approx(1, abs=1e-5) for r in rows)
    assert Image.open(output / "confusion.png").size[0] > 200


def test_evaluate_on_a_list(trained, data, tmp_path, capsys):
    """Its labels.txt counts, and parts of one video are told apart."""
    bright, dark = (data / "val" / name / "v0" for name in ("bright", "dark"))
    for subset in ("val", "other"):
        (tmp_path / subset).mkdir()
        lines = [f"{bright} 1 2 0", f"{bright} 1 3 0", f"{dark} 1 3 1"]
        (tmp_path / subset / "val.txt").write_text("\n".join(lines))
    (tmp_path / "other" / "labels.txt").write_text("dark\nbright\n")
    base = ["evaluate", trained / "best.pt", "--format", "tsn", "--workers", 0, "--no-progress", "--data"]
    assert "others ('bright', ..)" in fails(capsys, *base, tmp_path / "other")
    assert main([str(a) for a in (*base, tmp_path / "val", "--output", tmp_path / "out")]) == 0
    with (tmp_path / "out" / "predictions.csv").open() as file:
        names = [row["video"] for row in csv.DictReader(file)]
    assert names == [f"{bright} 1-2", f"{bright} 1-3", str(dark)]


def test_evaluate_where_the_list_lacks_a_class(trained, data, tmp_path, capsys):
    """As the newer csv of Jester may, which names the classes it has."""
    (tmp_path / "val.csv").write_text(f"video_id,label,label_id\n{data / 'val' / 'dark' / 'v0'},dark,1\n")
    options = ["--format", "jester", "--val-list", tmp_path / "val.csv", "--workers", 0, "--no-progress"]
    assert main([str(a) for a in ("evaluate", trained / "best.pt", "--data", tmp_path, *options)]) == 0
    assert "bright  no videos" in " ".join(capsys.readouterr().out.split(" "))


def test_names_that_are_no_unicode(trained, data, tmp_path, capsysbinary):
    video = tmp_path / "val" / "dark" / os.fsdecode(b"caf\xe9")
    shutil.copytree(data / "val" / "dark" / "v0", video)
    shutil.copytree(data / "val" / "bright", tmp_path / "val" / "bright")
    options = ["--data", tmp_path, "--workers", 0, "--no-progress", "--output", tmp_path / "out"]
    assert main([str(a) for a in ("evaluate", trained / "best.pt", "--format", "folder", *options)]) == 0
    assert b"caf\xe9," in (tmp_path / "out" / "predictions.csv").read_bytes()
    assert main(["predict", str(trained / "best.pt"), str(video)]) == 0
    assert b"caf\\udce9" in capsysbinary.readouterr().out


@pytest.mark.parametrize("command", ["predict", "watch", "explain"])
def test_the_default_device_is_cuda_where_there_is_one(command, monkeypatch, capsys, tmp_path):
    def load(source, device):
        raise ValueError(f"on {device}")

    monkeypatch.setattr(Recognizer, "from_checkpoint", load)
    arguments = [command, "x.pt", "x.mp4", *(("--out", tmp_path) if command == "explain" else ())]
    assert fails(capsys, *arguments, "--device", "cpu").endswith("error: on cpu")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert fails(capsys, *arguments).endswith(f"error: on {'cuda' if there else 'cpu'}")
    assert "torch sees no CUDA device" in fails(capsys, *arguments, "--device", "cuda")


def test_predict(trained, data, capsys, tmp_path):
    videos = [str(data / "val" / name / "v0") for name in ("bright", "dark")]
    assert main(["predict", str(trained / "best.pt"), *videos, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["video"] for line in lines] == videos
    recognizer = Recognizer.from_checkpoint(trained / "best.pt")
    for line in lines:
        own = recognizer(line["video"])
        assert [[p.label, p.score] for p in own] == line["predictions"]
        assert sum(p.score for p in own) == pytest.approx(1)
    assert (
        main(["predict", str(trained / "best.pt"), str(tmp_path / "none.mp4"), videos[0], "--top", "1"]) == 2
    )
    captured = capsys.readouterr()
    assert "none.mp4" in captured.err and len(captured.out.splitlines()) == 2


def test_recognizer_takes_frames_as_the_file(trained, data):
    recognizer = Recognizer.from_checkpoint(trained / "best.pt")
    folder = data / "val" / "dark" / "v0"
    frames = torch.stack(
        [torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in sorted(folder.iterdir())]
    )
    for protocol in ("1x1", "3x2"):
        torch.testing.assert_close(recognizer.scores(frames, protocol), recognizer.scores(folder, protocol))
    for wrong in (frames.float(), frames[:0], frames[0], frames[:, :1]):
        with pytest.raises(ValueError, match="expected uint8 frames"):
            recognizer(wrong)


def test_pretrained_folder_and_hub(trained, data, tmp_path, monkeypatch):
    """What is pushed is what is loaded; the hub's two calls are replaced, nothing leaves the machine."""
    import huggingface_hub

    recognizer = Recognizer.from_checkpoint(trained / "best.pt")
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
            assert (repo_id, private, exist_ok) == ("me/net", True, True)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            Path(folder_path).rename(hub)
            Path(folder_path).mkdir()
            return f"pushed {repo_id}"

    def download(repo_id: str, file: str, revision: str | None) -> str:
        assert (repo_id, revision) == ("me/net", "v1")
        return str(hub / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert recognizer.push_to_hub("me/net", private=True) == "pushed me/net"
    assert {p.name for p in hub.iterdir()} == {"config.json", "model.safetensors"}
    content = json.loads((hub / "config.json").read_text())
    assert content["architecture"] == "resnet10t" and content["label_names"] == ["bright", "dark"]
    video = torch.randint(0, 256, (5, 3, 40, 48), dtype=torch.uint8)
    for source in ("hf-hub:me/net@v1", hub):
        again = Recognizer.from_checkpoint(source)
        assert again.config.to_dict() == recognizer.config.to_dict()
        assert torch.equal(again.scores(video), recognizer.scores(video))
    base = ["--data", data, "--format", "folder", "--workers", 0, "--no-progress"]
    assert main([str(a) for a in ("evaluate", hub, *base)]) == 0
    model = build_model(recognizer.config)
    load_initial(model, hub)
    expected = again.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        again(video, 0)
    block = recognizer.model.model.layer2[0]
    block.bn1.bias = block.bn1.weight  # one tensor for two
    recognizer.save_pretrained(tmp_path / "tied")
    again = Recognizer.from_checkpoint(tmp_path / "tied")
    assert torch.equal(again.scores(video), recognizer.scores(video))
    (hub / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model of temporal-excite"):
        Recognizer.from_checkpoint(hub)
    (hub / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Recognizer.from_checkpoint(hub)


# ---- bad input: one line, code 2


def test_wrong_training_input(data, tmp_path, capsys):
    base = ["train", "--data", data, "--format", "folder", "--output", tmp_path / "run", *SMALL]
    assert "unknown recipe 'jestr'; known: " in fails(capsys, *base, "--recipe", "jestr")
    base += ["--recipe", "jester"]
    assert "timm has no model 'resnet51'; similar: resnet" in fails(capsys, *base, "--backbone", "resnet51")
    assert "actoin" in fails(capsys, *base, "--module", "actoin")
    assert "nonsense" in fails(capsys, *base, "--module-arg", "nonsense=1")
    assert "no data folder" in fails(capsys, *base, "--data", tmp_path / "none")
    assert "(--root) does not go with the format 'folder'" in fails(capsys, *base, "--root", data)
    error = fails(capsys, *base, "--format", "jester")
    assert "expected one *-train.csv (jester layout), found none" in error
    assert "do not fill one batch of 64" in fails(capsys, *base, "--batch-size", 64)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in fails(capsys, *base, "--device", "cuda")
    (tmp_path / "list.txt").write_text("v1 3 0\nv2 three 1\n")
    error = fails(capsys, *base, "--format", "tsn", "--train-list", tmp_path / "list.txt")
    assert "list.txt:2: " in error
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").write_text("a file")
    assert "cannot write to" in fails(capsys, *base)


def test_wrong_videos(data, tmp_path, capsys):
    """A broken picture is named; with --on-error skip the run goes on."""
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for video in (folder / "train" / "dark").iterdir():
        for picture in video.iterdir():
            picture.write_bytes(b"no picture")
    base = ["train", "--recipe", "jester", "--data", folder, "--format", "folder", "--epochs", "1", *SMALL]
    error = fails(capsys, *base, "--output", tmp_path / "a")
    problem = (
        rf"temporal-excite train: error: {folder}/train/dark/v\d/\d+.png: not a readable picture: [^\n]+"
    )
    assert re.fullmatch(problem, error)
    # in a process of its own: what is left of the workers ends with it
    command = [sys.executable, "-m", "temporal_excite", *base, "--output", tmp_path / "a", "--workers", "1"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(problem, done.stderr.strip())
    done = [str(a) for a in (*base, "--output", tmp_path / "b", "--on-error", "skip")]
    assert main(done) == 0
    (folder / "train" / "bright" / "empty").mkdir()
    shutil.rmtree(folder / "train" / "dark")
    assert "empty" in fails(capsys, *base, "--output", tmp_path / "c", "--labels", labels_file(tmp_path))


def labels_file(folder: Path) -> Path:
    path = folder / "labels.txt"
    path.write_text("bright\ndark\n")
    return path


def test_one_frame_is_enough_for_a_clip(trained):
    video = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8)
    assert len(Recognizer.from_checkpoint(trained / "best.pt")(video)) == 2


def test_wrong_checkpoints(trained, data, tmp_path, capsys):
    nothing = tmp_path / "none.pt"
    assert "no checkpoint" in fails(capsys, "predict", nothing, "x.mp4")
    assert "no checkpoint" in fails(capsys, "evaluate", nothing, "--data", data)
    checkpoint = trained / "best.pt"
    error = fails(capsys, "evaluate", checkpoint, "--data", data, "--protocol", "3x99")
    assert "got '3x99'" in error
    error = fails(capsys, "evaluate", checkpoint, "--data", data, "--batch-size", 0)
    assert "batch_size must be at least 1, got 0" in error
    error = fails(capsys, "evaluate", checkpoint, "--data", tmp_path, "--format", "tsn")
    assert "expected one val.txt" in error
    content = read_checkpoint(checkpoint)
    other: ModelConfig = dataclasses.replace(content["config"], backbone="resnet14t")
    save_checkpoint(nothing, other, content["state_dict"])
    assert "does not fit this model" in fails(capsys, "predict", nothing, data / "val" / "dark" / "v0")
    labels = dataclasses.replace(content["config"], labels=("x", "y"))
    save_checkpoint(nothing, labels, content["state_dict"])
    assert "'bright'" in fails(capsys, "evaluate", nothing, "--data", data, "--labels", labels_file(tmp_path))


# ---- explain


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """A checkpoint of the same network without temporal modules."""
    config = dataclasses.replace(read_checkpoint(trained / "best.pt")["config"], module=None)
    path = tmp_path_factory.mktemp("plain") / "tsn.pt"
    save_checkpoint(path, config, build_model(config).state_dict())
    return path


def test_explain(trained, plain, data, tmp_path, capsys):
    out, video = tmp_path / "new" / "out", data / "val" / "dark" / "v0"
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("of another")
    arguments = [
        "explain",
        trained / "best.pt",
        video,
        "--out",
        out,
        "--compare",
        plain,
        "--animation",
        "webp",
    ]
    assert main([str(a) for a in (*arguments, "--animation", "webp", "--device", "cpu")]) == 0
    shown = capsys.readouterr().out
    best = Recognizer.from_checkpoint(trained / "best.pt")(video, 1)[0]
    assert f"{best.label} {100 * best.score:.0f} %" in shown and "no module with a gate" in shown
    written = ["attention_1.png", "maps.png", "maps.webp", "masks_1.png"]
    assert f"wrote {', '.join(written)} to {out}" in shown
    assert {p.name for p in out.iterdir()} == {*written, "notes.txt"}
    assert Image.open(out / "maps.webp").n_frames == 2
    for more in (["--method", "cam"], ["--layer", "layer2", "--class", "dark"]):
        assert main([str(a) for a in (*arguments[:5], *more, "--format", "pdf", "--device", "cpu")]) == 0
        assert (out / "maps.pdf").read_bytes().startswith(b"%PDF")


def test_explain_refuses(trained, plain, data, tmp_path, capsys):
    checkpoint, video = trained / "best.pt", data / "val" / "dark" / "v0"
    base = ["explain", checkpoint, video, "--out", tmp_path / "out", "--device", "cpu"]
    assert "no layer 'layer9'" in fails(capsys, *base, "--layer", "layer9")
    assert "--layer goes with" in fails(capsys, *base, "--layer", "layer1", "--method", "cam")
    assert "'grey' is none of the 2 classes" in fails(capsys, *base, "--class", "grey")
    assert "none.mp4" in fails(capsys, "explain", checkpoint, "none.mp4", "--out", tmp_path / "out")
    assert "no checkpoint" in fails(capsys, *base, "--compare", tmp_path / "none.pt")
    config = dataclasses.replace(read_checkpoint(plain)["config"], n_segment=4)
    save_checkpoint(tmp_path / "four.pt", config, build_model(config).state_dict())
    assert "n_segment=4, not 2" in fails(capsys, *base, "--compare", tmp_path / "four.pt")
    config = dataclasses.replace(read_checkpoint(plain)["config"], labels=("a", "b"))
    save_checkpoint(tmp_path / "ab.pt", config, build_model(config).state_dict())
    assert "other classes" in fails(capsys, *base, "--compare", plain, tmp_path / "ab.pt")
    (tmp_path / "file").write_text("a file")
    assert "file" in fails(capsys, *base[:4], tmp_path / "file")
    assert not any(p.suffix == ".png" for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: temporal-excite" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_python_m_and_unknown_command():
    done = subprocess.run([sys.executable, "-m", "temporal_excite", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'trian'" in done.stderr
    assert "Traceback" not in done.stderr


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["predict", str(tmp_path / "none.pt"), "x.mp4", "--traceback"])


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capfd):
    def run(args):
        raise BrokenPipeError

    monkeypatch.setitem(sys.modules, "piped", SimpleNamespace(configure=lambda parser: None, run=run))
    monkeypatch.setitem(COMMANDS, "piped", ("piped", "prints"))
    assert main(["piped"]) == 141
    assert capfd.readouterr().err == ""

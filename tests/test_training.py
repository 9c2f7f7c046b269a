"""Training: recipes, groups, the loop, resuming, checkpoints, data folders."""

import dataclasses
import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import temporal_excite as te
from temporal_excite.training import (
    RECIPES,
    CheckpointError,
    ModelConfig,
    Recipe,
    RunOptions,
    World,
    build_model,
    engine,
    evaluate,
    freeze_batch_norm,
    get_recipe,
    load_initial,
    load_model,
    param_groups,
    parse_protocol,
    read_checkpoint,
    read_log,
    save_checkpoint,
    train,
)
from temporal_excite.training import checkpoint as checkpoint_module
from temporal_excite.training.checkpoint import load_weights
from temporal_excite.training.data import load_records, test_dataset, train_dataset
from temporal_excite.training.distributed import TrainBatches
from temporal_excite.training.evaluate import Evaluation, video_scores
from temporal_excite.training.optim import create_optimizer, create_schedule
from temporal_excite.video import Record
from temporal_excite.video.transforms import RandomFlip

CPU = World(torch.device("cpu"))
CONFIG = ModelConfig(
    backbone="resnet10t",
    module="action",
    labels=("a", "b", "c"),
    n_segment=2,
    backbone_args={"channels": [8, 8, 16, 16], "stem_width": 8},
)
RECIPE = dataclasses.replace(
    get_recipe("jester"), epochs=3, milestones=(1, 2), batch_size={2: 4}, dropout=0.5, crop=32, short_side=32
)
QUIET = RunOptions(progress=False, log_every=1)


class Clips(torch.utils.data.Dataset):
    """Random clips, others in every epoch."""

    def __init__(self, length: int = 10, seconds: float = 0.0) -> None:
        self.length, self.seconds, self.epoch = length, seconds, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        return torch.randn(2, 3, 32, 32, generator=generator), index % 3


def fresh(config: ModelConfig = CONFIG, seed: int = 0) -> te.VideoClassifier:
    torch.manual_seed(seed)
    return build_model(config)


def same_run(a: Path, b: Path) -> None:
    """Both folders hold the same losses and weights, bit for bit."""
    timing = ("clips_per_s", "seconds_left", "seconds")
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in read_log(f)] for f in (a, b)]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 1
    one, two = (read_checkpoint(f / "last.pt")["state_dict"] for f in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


# ---- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_has_a_source(name):
    recipe = RECIPES[name]
    numbers = {f.name for f in dataclasses.fields(Recipe)} - {"name", "dataset", "sources"}
    assert numbers == set(recipe.sources)
    assert list(recipe.milestones) == sorted(recipe.milestones)
    assert all(0 < m < recipe.epochs for m in recipe.milestones)
    assert set(recipe.batch_size) >= {8}


def test_recipes_are_the_papers():
    jester, ego, sth = get_recipe("jester"), get_recipe("egogesture"), get_recipe("sthv2")
    assert (jester.epochs, jester.milestones) == (30, (10, 20, 25))
    assert (ego.epochs, ego.milestones) == (25, (5, 10, 15))
    assert (sth.epochs, sth.milestones) == (50, (30, 40, 45))
    assert {r.lr for r in (jester, ego, sth)} == {0.01}
    assert (sth.batch(8), sth.batch(16), sth.weight_decay, sth.momentum) == (64, 48, 5e-4, 0.9)
    tea, kinetics, ucf = get_recipe("tea-sthv1"), get_recipe("tea-kinetics"), get_recipe("ucf101")
    assert (tea.lr, tea.weight_decay, tea.head_decay) == (0.02, 5e-4, 5)
    assert (kinetics.lr, kinetics.weight_decay) == (0.01, 1e-4)
    assert (ucf.lr, ucf.dropout, ucf.epochs, ucf.milestones, ucf.batch_norm) == (
        *(0.001, 0.8, 25, (10, 20), "partial"),
    )
    tefe = get_recipe("tefe-sthv1")
    assert (tefe.lr, tefe.batch(8), tefe.batch(16)) == (0.001, 20, 10)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown recipe 'jestr'; known: .*jester"):
        get_recipe("jestr")


# ---- optimiser


def test_groups_are_the_released_ones():
    model = fresh(dataclasses.replace(CONFIG, backbone="mobilenetv2_050", backbone_args={}))
    groups = {g["name"]: g for g in param_groups(model, 0.1, dataclasses.replace(RECIPE, head_decay=5.0))}
    values = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert values == {
        "weights": (0.1, 5e-4),
        "norms": (0.1, 0.0),
        "head weight": (0.5, 25e-4),
        "head bias": (1.0, 0.0),
    }
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    head = model.model.get_classifier()
    assert groups["head weight"]["params"] == [head.weight]
    temporal = [p for n, p in model.named_parameters() if n.endswith("temporal.shift.weight")]
    assert temporal and all(any(p is q for q in groups["weights"]["params"]) for p in temporal)


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("repvit", ["head.head.l"]),
        ("efficientformer", ["head", "head_dist"]),
        ("caformer", ["head.fc.fc2"]),
        ("cpubone", ["head.classifier.linear"]),
    ],
)
def test_heads_of_more_than_one_layer(tmp_path, family, heads):
    member = FAMILIES[family]

    def network(classes: int, seed: int) -> te.VideoClassifier:
        torch.manual_seed(seed)
        backbone = timm.create_model(member.name, num_classes=classes, **member.smaller)
        model = te.VideoClassifier(backbone, 2, dropout=0.0)
        model.reset_head(classes)
        return model

    model = network(3, 0)
    layers = [model.model.get_submodule(name) for name in heads]
    assert all(0.0005 < layer.weight.std() < 0.002 and not layer.bias.any() for layer in layers)
    groups = {g["name"]: g["params"] for g in param_groups(model, 0.1, RECIPE)}
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups["head weight"]} == {id(layer.weight) for layer in layers}
    assert {id(p) for p in groups["head bias"]} == {id(layer.bias) for layer in layers}

    save_checkpoint(tmp_path / "x.pt", CONFIG, model.state_dict())
    target, same = network(5, 1), network(3, 1)
    own = {key: value.clone() for key, value in target.state_dict().items()}
    for other in (target, same):
        load_initial(other, tmp_path / "x.pt")
    kept = [f"model.{name}.{kind}" for name in heads for kind in ("weight", "bias")]
    for key, value in target.state_dict().items():
        assert torch.equal(value, own[key] if key in kept else model.state_dict()[key])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_a_conv_bias_has_twice_the_rate_and_no_decay():
    net = fresh(dataclasses.replace(CONFIG, module=None))
    net.model.conv1 = nn.Conv2d(3, 8, 3, bias=True)
    group = next(g for g in param_groups(net, 0.1, RECIPE) if g["name"] == "biases")
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.2, 0.0, 1)


def test_learning_rate_falls_at_the_milestones():
    optimizer = create_optimizer(fresh(), 0.01, RECIPE)
    assert not any(g["nesterov"] for g in optimizer.param_groups)
    schedule = create_schedule(optimizer, dataclasses.replace(RECIPE, epochs=30, milestones=(10, 20, 25)), 4)
    for update in range(120):
        schedule.step_update(update)
        epoch = update // 4
        expected = 0.01 * 0.1 ** sum(epoch >= m for m in (10, 20, 25))
        factors = {"weights": 1, "norms": 1, "head weight": 5, "head bias": 10}
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * factors[group["name"]], rel=1e-9)


def test_one_cycle_rises_and_falls():
    optimizer = create_optimizer(fresh(), 1.0, RECIPE)
    cycle = dataclasses.replace(RECIPE, epochs=10, milestones=(), warmup=0.2)
    schedule = create_schedule(optimizer, cycle, 10)
    rates = []
    for update in range(100):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0 and max(rates) == rates[20] == pytest.approx(1.0)
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 0.01


@pytest.mark.parametrize(("mode", "free"), [("train", None), ("partial", 1), ("frozen", 0)])
def test_frozen_batch_norm(mode, free):
    model = fresh().train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [n.running_mean.clone() for n in norms]
    freeze_batch_norm(model, mode)
    model(torch.randn(2, 2, 3, 32, 32)).sum().backward()
    changed = [not torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True)]
    expected = len(norms) if free is None else free
    assert changed == [True] * expected + [False] * (len(norms) - expected)
    assert [n.weight.grad is not None for n in norms] == changed


# ---- who takes which clips


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 4), accumulate=st.integers(1, 3), per=st.integers(1, 3), spare=st.integers(0, 20))
def test_batches_do_not_depend_on_the_number_of_processes(size, accumulate, per, spare):
    batch = size * accumulate * per
    length = batch + spare
    alone = TrainBatches(length, batch, 1, 7, CPU)
    shares = [TrainBatches(length, batch, accumulate, 7, World(CPU.device, r, size)) for r in range(size)]
    for epoch in (0, 3):
        for sampler in (alone, *shares):
            sampler.epoch = epoch
        whole = list(alone)
        assert len(whole) == length // batch == alone.steps
        parts = [list(s) for s in shares]
        assert all(len(p) == len(whole) * accumulate == len(s) for p, s in zip(parts, shares, strict=True))
        for step, indices in enumerate(whole):
            taken = [i for p in parts for one in p[step * accumulate : (step + 1) * accumulate] for i in one]
            assert sorted(taken) == sorted(indices)
        assert len({i for indices in whole for i in indices}) == len(whole) * batch
        shares[0].start = 1
        assert list(shares[0]) == parts[0][accumulate:]
        shares[0].start = 0
    assert list(alone) != (setattr(alone, "epoch", 4) or list(alone)) or length < 4


@settings(max_examples=25, deadline=None)
@given(
    group=st.integers(1, 3), size=st.integers(1, 3), accumulate=st.integers(1, 2), per=st.integers(1, 2),
    spare=st.integers(0, 5),
)  # fmt: skip
def test_groups_stay_together(group, size, accumulate, per, spare):
    batch = group * size * accumulate * per
    for rank in range(size):
        world = World(CPU.device, rank, size)
        for indices in TrainBatches(batch + group * spare, batch, accumulate, 7, world, group):
            starts = indices[::group]
            assert indices == [start + k for start in starts for k in range(group)]
            assert all(start % group == 0 for start in starts)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 30), size=st.integers(1, 5))
def test_evaluation_takes_everything_once(length, size):
    taken = [i for r in range(size) for i in World(CPU.device, r, size).share_of(length)]
    assert sorted(taken) == list(range(length))


@pytest.mark.parametrize(
    ("length", "batch", "accumulate", "group", "message"),
    [
        (10, 5, 2, 1, "batch size 5 .* multiple of 2"),
        (3, 4, 1, 1, "3 training clips .* batch of 4"),
        (9, 0, 1, 1, "0"),
        (12, 6, 2, 2, "12 training clips, 3 of them in a pass, .* groups of 2"),
        (9, 4, 1, 2, "9 training clips, 4 of them in a pass, .* groups of 2"),
    ],
)
def test_batches_that_do_not_divide(length, batch, accumulate, group, message):
    with pytest.raises(ValueError, match=message):
        TrainBatches(length, batch, accumulate, 0, CPU, group)


# ---- the loop


def test_training_writes_what_it_says(tmp_path):
    seen = []
    result = train(
        fresh(), CONFIG, RECIPE, Clips(), Clips(5), tmp_path, options=QUIET,
        on_epoch=lambda epoch, e: seen.append((epoch, e.top1)),
    )  # fmt: skip
    assert result.finished and [epoch for epoch, _ in seen] == [0, 1, 2]
    steps, epochs = read_log(tmp_path, "step"), read_log(tmp_path, "epoch")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["clips_per_s"] > 0 and line["seconds_left"] >= 0 for line in steps)
    for epoch, line in enumerate(epochs):
        losses = [s["loss"] for s in steps if s["epoch"] == epoch]
        assert line["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert steps[0]["lr"] == pytest.approx(0.01) and steps[-1]["lr"] == pytest.approx(1e-4)
    best = read_checkpoint(tmp_path / "best.pt")
    assert best["config"] == CONFIG and "training" not in best
    again = evaluate(load_model(tmp_path / "best.pt")[0], Clips(5), CONFIG.labels)
    assert again.top1 == max(e["val_top1"] for e in epochs)


def test_the_learning_rate_scales_with_the_batch(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1, milestones=())
    options = dataclasses.replace(QUIET, batch_size=8)
    train(
        fresh(),
        CONFIG,
        dataclasses.replace(recipe, milestones=(1,)),
        Clips(),
        None,
        tmp_path,
        options=options,
    )
    assert read_log(tmp_path, "step")[0]["lr"] == pytest.approx(0.02)


def test_accumulation_is_the_whole_batch(tmp_path):
    config = dataclasses.replace(CONFIG, dropout=0.0)
    recipe = dataclasses.replace(RECIPE, batch_norm="frozen")
    for accumulate in (1, 2):
        options = dataclasses.replace(QUIET, accumulate=accumulate)
        train(fresh(config), config, recipe, Clips(), None, tmp_path / str(accumulate), options=options)
    one, two = ([line["loss"] for line in read_log(tmp_path / f, "step")] for f in "12")
    assert one == pytest.approx(two, rel=1e-4)


def test_loss_that_is_not_finite_stops(tmp_path):
    class Broken(Clips):
        def __getitem__(self, index):
            return torch.full((2, 3, 32, 32), float("nan")), 0

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1 .*--lr"):
        train(fresh(), CONFIG, RECIPE, Broken(), None, tmp_path, options=QUIET)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_and_moving_average(tmp_path, amp):
    options = dataclasses.replace(QUIET, amp=amp, ema=0.5)
    model = fresh()
    train(model, CONFIG, RECIPE, Clips(), Clips(4), tmp_path, options=options)
    content = read_checkpoint(tmp_path / "last.pt")
    raw, kept = content["training"]["model"], content["state_dict"]
    key = "model.fc.weight"
    assert torch.equal(raw[key], model.state_dict()[key]) and not torch.equal(raw[key], kept[key])
    losses = [line["loss"] for line in read_log(tmp_path, "step")]
    assert all(0 < loss < 10 for loss in losses)


def test_compiled_training_is_the_same(tmp_path, monkeypatch):
    compiled = []

    def eager(network):
        compiled.append(network)
        return compile_(network, backend="eager")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", eager)
    losses = []
    for i in range(2):
        options = dataclasses.replace(QUIET, compile=bool(i))
        train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path / str(i), options=options)
        losses.append([line["loss"] for line in read_log(tmp_path / str(i), "step")])
    assert len(compiled) == 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    load_model(tmp_path / "1" / "last.pt")


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch, capsys):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "run" / "tensorboard")
            written["purged from"] = purge_step

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            written["closed"] = True

    options = dataclasses.replace(QUIET, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with pytest.raises(ValueError, match="pip install tensorboard"):
        shown = dataclasses.replace(options, progress=True)
        train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path / "none", options=shown)
    assert capsys.readouterr().err == ""  # no bar
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(fresh(), CONFIG, RECIPE, Clips(), Clips(4), tmp_path / "run", options=options)
    for line in read_log(tmp_path / "run", "step"):
        assert written["step/loss", line["step"]] == line["loss"]
    for line in read_log(tmp_path / "run", "epoch"):
        assert written["epoch/val_top1", line["step"]] == line["val_top1"]
    assert written["closed"] and written["purged from"] is None
    steps = len(read_log(tmp_path / "run", "step"))
    train(fresh(), CONFIG, RECIPE, Clips(), Clips(4), tmp_path / "run", options=options, resume=True)
    assert written["purged from"] == steps + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amp": "half"}, "amp must be one of off, bfloat16, float16, got 'half'"),
        ({"ema": 1.0}, r"ema is a decay in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"sync_bn": True}, "sync_bn needs CUDA"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"save_every": -1}, "save_every must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_wrong_options(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path / "run", options=RunOptions(**change))
    assert not (tmp_path / "run").exists()


# ---- stopping and going on

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_training import *
from temporal_excite.training import join_world, leave_world
if __name__ == "__main__":
    torch.set_num_threads(1)
    options = dataclasses.replace(QUIET, save_every=2, ema=0.9, accumulate=2, workers={workers})
    recipe = dataclasses.replace(RECIPE, batch_norm={batch_norm!r})
    config = dataclasses.replace(CONFIG, dropout={dropout})
    result = train(fresh(config), config, recipe, Clips(21, {seconds}), Clips(5), sys.argv[1],
                   options=options, resume=True, world=join_world("cpu"))
    leave_world()
    raise SystemExit(0 if result.finished else 143)
"""


def script(tmp_path: Path, name: str, **values: object) -> Path:
    path = tmp_path / name
    settings = {"seconds": 0.0, "workers": 0, "batch_norm": "train", "dropout": 0.5} | values
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), **settings))
    return path


def environment() -> dict[str, str]:
    root = str(Path(te.__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def start(path: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, path, folder], env=environment(), stderr=subprocess.PIPE, text=True
    )


def run_here(path: Path, folder: Path) -> None:
    """The script in this process: another one would spend most of its time on imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), str(folder)])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0


def wait_for(folder: Path, steps: int, process: subprocess.Popen) -> None:
    """Until the log of a run has so many steps."""
    log = folder / "log.jsonl"
    for _ in range(1200):
        if log.exists() and log.read_text().count('"kind": "step"') >= steps:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run does not get on")


class NoDoubles(TorchDispatchMode):
    """Stands for a device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, func
        return result


def test_training_needs_no_float64(tmp_path):
    with NoDoubles():
        train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path, options=QUIET)


def test_many_processes_stop_after_the_step(tmp_path):
    """Of two processes, here one in a group of its own."""

    class Stopping(Clips):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        options = dataclasses.replace(QUIET, log_every=100)
        world = World(torch.device("cpu"), 0, 2)
        result = train(
            fresh(), CONFIG, RECIPE, Stopping(), None, tmp_path / "run", options=options, world=world
        )
    finally:
        dist.destroy_process_group()
    assert not result.finished and read_checkpoint(result.checkpoint)["training"]["updates"] == 1


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 0), (signal.SIGTERM, 1)])
def test_a_killed_run_goes_on_bit_equal(tmp_path, how, workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    slow = script(tmp_path, "slow.py", seconds=0.05, workers=workers)
    fast = script(tmp_path, "fast.py")
    # 5 steps an epoch, saved after steps 2, 4, 5, 6, 8 ..: step 8 is in the middle of the second epoch
    process = start(slow, killed)
    wait_for(killed, 8, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else -signal.SIGKILL), errors
    stopped = read_checkpoint(killed / "last.pt")["training"]
    assert stopped["epoch"] == 1 and 5 < stopped["updates"] < 15
    if how == signal.SIGTERM:
        assert stopped["updates"] == read_log(killed, "step")[-1]["step"]
    else:
        with (killed / "log.jsonl").open("a") as log:
            log.write('{"kind": "st')  # cut off in the middle of a line
    for folder in (killed, whole):
        run_here(fast, folder)
    assert len(read_log(whole, "step")) == 15
    same_run(whole, killed)


def test_two_processes_are_one(tmp_path):
    """Gradients, losses and metrics of two gloo processes are those of one on the same global batch."""
    path = script(tmp_path, "both.py", batch_norm="frozen", dropout=0.0)
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_here(path, one)
    done = subprocess.run(
        [*launch, path, two], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [read_log(folder) for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 18
    for a, b in zip(*lines, strict=True):
        assert a["kind"] == b["kind"] and a["step"] == b["step"]
        for name in {"loss", "train_loss", "val_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
        for name in {
            "top1",
            "train_top1",
            "val_top1",
            "val_top5",
        } & a.keys():  # of 5 videos: no padding counted
            assert a[name] == pytest.approx(b[name], abs=1e-9)
    states = [read_checkpoint(folder / "last.pt")["state_dict"] for folder in (one, two)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-5)
    start = fresh(dataclasses.replace(CONFIG, dropout=0.0)).state_dict()
    assert not torch.allclose(states[0]["model.fc.weight"], start["model.fc.weight"], atol=1e-3)


def test_processes_evaluate_one_network(tmp_path):
    """Batch normalisation's statistics are each process's own while it trains."""
    path = script(tmp_path, "both.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, path, tmp_path / "two"], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    again = evaluate(load_model(tmp_path / "two" / "last.pt")[0], Clips(5), CONFIG.labels)
    assert read_log(tmp_path / "two", "epoch")[-1]["val_loss"] == pytest.approx(again.loss, rel=1e-5)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_file_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch, number):
    """Three files at the end of the first epoch, two or three at that of the second."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(fresh(), CONFIG, RECIPE, Clips(), Clips(5), whole, options=QUIET)
    written = []

    def save(path, *args):
        written.append(path.name)
        if len(written) == number:
            raise CheckpointError("full")
        save_checkpoint(path, *args)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    with pytest.raises(CheckpointError, match="full"):
        train(fresh(), CONFIG, RECIPE, Clips(), Clips(5), stopped, options=QUIET)
    assert written[:3] == ["last.pt", "best.pt", "last.pt"][:number]
    train(fresh(), CONFIG, RECIPE, Clips(), Clips(5), stopped, options=QUIET, resume=True)
    same_run(whole, stopped)
    assert [line["epoch"] for line in read_log(stopped, "epoch")] == [0, 1, 2]
    best = [read_checkpoint(folder / "best.pt")["state_dict"] for folder in (whole, stopped)]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())


def test_a_run_killed_in_its_validation_has_the_epoch(tmp_path):
    class Killing(Clips):
        def __getitem__(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(), CONFIG, RECIPE, Clips(), Killing(5), tmp_path, options=QUIET)
    training = read_checkpoint(tmp_path / "last.pt")["training"]
    assert (training["epoch"], training["updates"]) == (0, 2)


def test_a_fresh_run_clears_what_a_killed_one_left(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 1}\n')
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path, options=QUIET, resume=True)
    assert [line["step"] for line in read_log(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "log.jsonl"}


def test_resume_refuses_another_run(tmp_path):
    train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path, options=QUIET)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path, options=QUIET)
    other = dataclasses.replace(CONFIG, backbone="resnet14t")
    with pytest.raises(CheckpointError, match=r"\(model\): backbone was 'resnet10t', is 'resnet14t'"):
        train(fresh(other), other, RECIPE, Clips(), None, tmp_path, options=QUIET, resume=True)
    recipe = dataclasses.replace(RECIPE, lr=1.0)
    with pytest.raises(CheckpointError, match=r"another run \(recipe\): lr was 0.01, is 1.0"):
        train(fresh(), CONFIG, recipe, Clips(), None, tmp_path, options=QUIET, resume=True)
    with pytest.raises(CheckpointError, match=r"another run \(data\): training clips was 10, is 11"):
        train(fresh(), CONFIG, RECIPE, Clips(11), None, tmp_path, options=QUIET, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    content = read_checkpoint(tmp_path / "last.pt")
    del content["training"]["clips"]  # as older versions wrote it
    save_checkpoint(tmp_path / "last.pt", CONFIG, content["state_dict"], content["training"])
    done = train(fresh(), CONFIG, RECIPE, Clips(), None, tmp_path, options=QUIET, resume=True)
    assert done.finished and len(read_log(tmp_path, "step")) == 6


# ---- checkpoints


def test_config_survives_its_file(tmp_path):
    config = dataclasses.replace(CONFIG, module_args={"stages": (2, 3)}, mean=(0.1, 0.2, 0.3))
    model = fresh(config)
    save_checkpoint(tmp_path / "x.pt", config, model.state_dict())
    again, read = load_model(tmp_path / "x.pt")
    assert read.to_dict() == config.to_dict() == json.loads(json.dumps(config.to_dict()))
    assert read.labels == config.labels and read.mean == config.mean
    clips = torch.randn(2, 2, 3, 32, 32)
    assert torch.equal(again(clips), model.eval()(clips))


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save_checkpoint(path, CONFIG, {"w": torch.zeros(3)})
    before = path.read_bytes()

    def full(content, file):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"x\.pt: .*No space left .*MiB free.*previous .*intact"):
        save_checkpoint(path, CONFIG, {"w": torch.ones(100_000)})

    def interrupted(content, file):
        file.write(b"some of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, CONFIG, {"w": torch.ones(3)})
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_a_real_write_error_leaves_the_old_checkpoint(tmp_path):
    code = (
        "import resource, sys, torch; from test_training import *\n"
        "path = sys.argv[1]; save_checkpoint(path, CONFIG, {'w': torch.zeros(3)})\n"
        "before = open(path, 'rb').read()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save_checkpoint(path, CONFIG, {'w': torch.zeros(1_000_000)})\n"
        "except CheckpointError as e: assert 'File too large' in str(e) and 'intact' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
        "assert open(path, 'rb').read() == before and len(list(Path(path).parent.iterdir())) == 1\n"
    )
    env = environment() | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.pt"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"x\.pt is no readable checkpoint"):
        read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="holds no temporal-excite checkpoint"):
        read_checkpoint(path)
    torch.save(nn.Linear(1, 1), path)  # needs code to load
    with pytest.raises(CheckpointError, match="no readable checkpoint: damaged, or more than tensors"):
        read_checkpoint(path)
    save_checkpoint(path, CONFIG, fresh().state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255  # in the middle of the weights
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"BadZipFile: the checksum of .* is wrong"):
        read_checkpoint(path)
    save_checkpoint(path, CONFIG, fresh(dataclasses.replace(CONFIG, backbone="resnet14t")).state_dict())
    with pytest.raises(CheckpointError, match=r"x\.pt does not fit this model: .* unknown"):
        load_model(path)
    save_checkpoint(path, CONFIG, {})
    content = torch.load(path, weights_only=True)
    del content["config"]["labels"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"\['labels'\] are missing"):
        read_checkpoint(path)


def test_no_write_permission(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
        train(fresh(), CONFIG, RECIPE, Clips(), None, blocked / "run", options=QUIET)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.pt: .*nothing was written"):
        save_checkpoint(tmp_path / "none" / "x.pt", CONFIG, {})


def test_fine_tuning_takes_all_but_another_classifier(tmp_path):
    source = fresh()
    save_checkpoint(tmp_path / "x.pt", CONFIG, source.state_dict())
    target = fresh(dataclasses.replace(CONFIG, labels=tuple("abcdefg")), seed=1)
    head = target.model.fc.weight.clone()
    load_initial(target, tmp_path / "x.pt")
    assert torch.equal(target.model.fc.weight, head)
    assert torch.equal(target.model.conv1[0].weight, source.model.conv1[0].weight)
    same = fresh(seed=2)
    load_initial(same, tmp_path / "x.pt")
    assert torch.equal(same.model.fc.weight, source.model.fc.weight)


def test_unknown_backbone_names_similar_ones():
    with pytest.raises(ValueError, match=r"no model 'resnet5'; similar: .*resnet50"):
        build_model(dataclasses.replace(CONFIG, backbone="resnet5"))


def test_what_timm_refuses_is_named():
    config = dataclasses.replace(CONFIG, backbone="resnet18", backbone_args={"output_stride": 7})
    with pytest.raises(ValueError, match=r"timm does not build 'resnet18' with \{'output_stride': 7\}"):
        build_model(config)


# ---- evaluation


def test_scores_average_the_softmax_over_the_views():
    model = fresh().eval()
    clips = torch.randn(3, 4, 2, 3, 32, 32)
    expected = torch.stack([model(clips[:, v]).softmax(1) for v in range(4)]).mean(0)
    for limit in (None, 5):
        torch.testing.assert_close(video_scores(model, clips, limit), expected)
    frames = torch.stack(
        [model.model(clips[0, :, t]) for t in range(2)]
    )  # the shift sees both frames at once
    assert frames.shape == (2, 4, 3)
    assert not torch.allclose(expected, model(clips.mean(1)).softmax(1))


def test_metrics():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    result = Evaluation(torch.arange(4), scores, torch.tensor([0, 1, 1, 1]), ("a", "b", "c"))
    assert result.top1 == 50 and result.topk(2) == 100 and result.top5 == 100
    assert result.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    a, b, c = result.per_class
    assert (a, b) == (100, pytest.approx(100 / 3)) and c != c
    expected = -torch.tensor([0.7, 0.3, 0.2, 0.5]).log().mean().item()
    assert result.loss == pytest.approx(expected)


def test_class_names_are_no_formulas(tmp_path):
    labels = (r"from $5 to $6", r"$\frac$")
    scores = torch.eye(2)
    Evaluation(torch.arange(2), scores, torch.arange(2), labels).plot_confusion(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_evaluation_leaves_unreadable_videos_out():
    class Some(Clips):
        broken = (1, 3)

    result = evaluate(fresh(), Some(5), CONFIG.labels, batch_size=2)
    assert result.indices.tolist() == [0, 2, 4] and result.skipped == 2
    Some.broken = range(5)
    with pytest.raises(ValueError, match="none of the 5 videos"):
        evaluate(fresh(), Some(5), CONFIG.labels)
    with pytest.raises(ValueError, match="empty"):
        evaluate(fresh(), Clips(0), CONFIG.labels)


def test_evaluation_workers_leave_sigterm_to_the_main_process():
    class Asked(Clips):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], int(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)

    assert evaluate(fresh(), Asked(2), CONFIG.labels, workers=1).targets.tolist() == [1, 1]


@pytest.mark.parametrize("protocol", ["2x1", "3x0", "3x11", "3", "3x", "x", "3X10", ""])
def test_wrong_protocol(protocol):
    with pytest.raises(ValueError, match="CROPSxCLIPS"):
        parse_protocol(protocol)


def test_protocols():
    assert parse_protocol("1x1") == (1, 1) and parse_protocol("3x10") == (3, 10)


# ---- data folders


def frames(folder: Path, count: int, size: tuple[int, int] = (40, 32)) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((*size, 3), 20 * i, dtype=np.uint8)).save(folder / f"{i:05d}.jpg")


def test_class_folders(tmp_path):
    for subset, name in (("train", "wave"), ("train", "clap"), ("val", "wave")):
        frames(tmp_path / subset / name / "video1", 3)
    records, labels = load_records(tmp_path, "folder", "train")
    assert labels == ["clap", "wave"] and [r.label for r in records] == [0, 1]
    val, same = load_records(tmp_path, "folder", "val", labels=labels)
    assert same == labels and [r.label for r in val] == [1]
    clip, label = test_dataset(
        val, dataclasses.replace(CONFIG, labels=tuple(labels), short_side=32, crop=32)
    )[0]
    assert clip.shape == (2, 3, 32, 32) and label == 1
    config = dataclasses.replace(CONFIG, labels=tuple(labels), short_side=32, crop=16)
    views, _ = test_dataset(val, config, "3x4")[0]
    assert views.shape == (12, 2, 3, 32, 32)
    clip, _ = train_dataset(records, config)[0]
    assert clip.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="'wave' is none of the 1 classes"):
        load_records(tmp_path, "folder", "val", labels=["clap"])


@pytest.mark.parametrize(
    ("labels", "flip", "pairs"),
    [
        (("1", "2"), "auto", None),
        (("1", "2"), "plain", {}),
        (("G05", "G06", "B0A"), "auto", None),
        (("class_05", "class_06"), "auto", None),
        (("left1", "right1"), "auto", {0: 1, 1: 0}),
        (("wave", "2"), "auto", {}),
        (("Swiping Left", "Swiping Right"), "auto", {0: 1, 1: 0}),
    ],
)
def test_clips_of_numbered_classes_are_not_mirrored(labels, flip, pairs, caplog):
    dataset = train_dataset([Record(Path("x"), 0)], dataclasses.replace(CONFIG, labels=labels), flip=flip)
    flips = [step.pairs for step in dataset.transform.transforms if isinstance(step, RandomFlip)]
    assert flips == ([] if pairs is None else [pairs])
    assert ("--flip plain mirrors" in caplog.text) == (pairs is None)


def test_what_lies_beside_videos(tmp_path, caplog):
    (tmp_path / "train").mkdir()
    for name in ("clap", ".cache", "@eaDir", "__MACOSX"):
        for path in (tmp_path / "train", tmp_path / "train" / "clap"):
            (path / name).mkdir(exist_ok=True)
    for file in ("a.MTS", "b.3gp", "notes.txt", "Makefile", ".DS_Store", "c.TXT"):
        (tmp_path / "train" / "clap" / file).touch()
    records, labels = load_records(tmp_path, "folder", "train")
    assert labels == ["clap"] and [r.path.name for r in records] == ["a.MTS", "b.3gp", "clap"]
    (warning,) = caplog.messages
    assert warning.endswith("3 files left out, whose endings are not those of videos: .txt, Makefile")
    (tmp_path / "train" / "wave").mkdir()
    with pytest.raises(ValueError, match="train: no videos in the class folder 'wave': remove it"):
        load_records(tmp_path, "folder", "train")
    assert load_records(tmp_path, "folder", "train", labels=["clap", "wave"])[0] == records


def test_layouts(tmp_path):
    (tmp_path / "jester-v1-labels.csv").write_text("Stop\nGo\n")
    (tmp_path / "jester-v1-train.csv").write_text("1;Go\n2;Stop\n")
    (tmp_path / "jester-v1-validation.csv").write_text("3;Stop\n")
    (tmp_path / "20bn-jester-v1").mkdir()
    records, labels = load_records(tmp_path, "jester", "train")
    assert labels == ["Stop", "Go"] and [r.label for r in records] == [1, 0]
    assert records[0].path == tmp_path / "20bn-jester-v1" / "1"
    assert [r.label for r in load_records(tmp_path, "jester", "val")[0]] == [0]
    with pytest.raises(
        FileNotFoundError, match=r"expected one val\.txt \(tsn layout\), found none.*--val-list"
    ):
        load_records(tmp_path, "tsn", "val")
    with pytest.raises(FileNotFoundError, match="no data folder"):
        load_records(tmp_path / "none", "tsn", "val")
    with pytest.raises(ValueError, match="unknown data format 'zip'; known: folder, tsn"):
        load_records(tmp_path, "zip", "val")


def test_run_options(tmp_path):
    options = dataclasses.replace(QUIET, log_every=4, evaluate_every=2, lr=0.5)
    train(fresh(), CONFIG, RECIPE, Clips(), Clips(5), tmp_path, options=options)
    steps = read_log(tmp_path, "step")
    assert [line["step"] for line in steps] == [2, 4, 6] and steps[0]["lr"] == 0.5
    assert ["val_top1" in line for line in read_log(tmp_path, "epoch")] == [False, True, True]


@pytest.mark.parametrize("what", ["order", "dropout"])
def test_seed(tmp_path, what):
    class Same(Clips):
        def __getitem__(self, index):
            return super().__getitem__(0)

    config = dataclasses.replace(CONFIG, dropout=0.0) if what == "order" else CONFIG
    losses = []
    for seed in (0, 1):
        output, options = tmp_path / str(seed), dataclasses.replace(QUIET, seed=seed)
        train(
            fresh(config),
            config,
            RECIPE,
            (Clips if what == "order" else Same)(),
            None,
            output,
            options=options,
        )
        losses.append([line["loss"] for line in read_log(output, "step")])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_gradients_are_clipped(tmp_path, amp):
    recipe = dataclasses.replace(RECIPE, clip_grad=1e-3, epochs=1, milestones=(1,), weight_decay=0.0)
    model = fresh()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, CONFIG, recipe, Clips(4), None, tmp_path, options=dataclasses.replace(QUIET, amp=amp))
    changes = [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    assert 1e-6 < torch.cat(changes).norm() < 2e-4  # one step: of 1e-3, by rates of 0.01 to 0.1


def test_evaluation_restores_the_mode():
    model = fresh().train()
    evaluate(model, Clips(4), CONFIG.labels)
    assert model.training


def test_no_score_has_a_finite_loss():
    assert Evaluation(torch.arange(1), torch.tensor([[1.0, 0.0]]), torch.tensor([1]), ("a", "b")).loss < 100


def test_scores_are_float32():
    views = torch.rand(1, 2, 3, 32, 32).bfloat16()
    assert video_scores(fresh().bfloat16().eval(), views).dtype == torch.float32


@pytest.mark.parametrize("call", ["evaluate", "train"])
def test_program_ends_after_a_workers_error(tmp_path, call):
    """Workers ignore SIGTERM, and the interpreter's end waits for them."""
    code = f"""
import test_training as t

class Broken(t.Clips):
    def __getitem__(self, index):
        raise OSError("broken clip")

if {call!r} == "evaluate":
    t.evaluate(t.fresh(), Broken(), t.CONFIG.labels, workers=2)
else:
    options = t.dataclasses.replace(t.QUIET, workers=2)
    t.train(t.fresh(), t.CONFIG, t.RECIPE, Broken(), None, {str(tmp_path / "run")!r}, options=options)
"""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "broken clip" in done.stderr


def test_unknown_subset(tmp_path):
    with pytest.raises(ValueError, match="subset must be 'train' or 'val', got 'test'"):
        load_records(tmp_path, "folder", "test")


@pytest.mark.parametrize(
    "values",
    [
        {"backbone_args": {"act_layer": nn.SiLU}},
        {"module_args": {"stages": {2, 3}}},
        {"labels": "abc"},
        {"labels": (1, 2)},
        {"backbone": None},
        {"crop": "x"},
    ],
    ids=str,
)
def test_config_of_what_no_checkpoint_can_hold(values):
    with pytest.raises(TypeError, match=f"{next(iter(values))} .*must be|{next(iter(values))} must"):
        dataclasses.replace(CONFIG, **values)


def test_numpy_in_a_config(tmp_path):
    labels = tuple(np.array(CONFIG.labels))
    config = dataclasses.replace(CONFIG, labels=labels, mean=tuple(np.array([0.5] * 3)))
    save_checkpoint(tmp_path / "a.pt", config, fresh().state_dict())
    assert read_checkpoint(tmp_path / "a.pt")["config"].labels == CONFIG.labels


@pytest.mark.parametrize(
    "values",
    [{"format": "1"}, {"config": None}, {"config": {"backbone": 3}}, {"state_dict": {"a": 1}}],
    ids=str,
)
def test_foreign_values_in_a_checkpoint(tmp_path, values):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CONFIG, fresh().state_dict())
    content = torch.load(path, weights_only=True)
    for key, value in values.items():
        content[key] = content[key] | value if value and isinstance(value, dict) else value
    torch.save(content, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_weights_without_values(tmp_path):
    model = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    name = next(reversed(before))
    with pytest.raises(CheckpointError, match="1 of another shape or kind"):
        load_weights(model, before | {name: torch.empty_like(before[name], device="meta")}, "file")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_ties_are_broken_in_one_way():
    targets = torch.tensor([0, 1, 2, 0])
    found = Evaluation(torch.arange(4), torch.full((4, 10), 0.1), targets, tuple("abcdefghij"))
    assert found.top1 == 50 and found.confusion.diagonal().sum() == 2
    assert found.topk(3) == 100 and found.predictions.tolist() == [0] * 4


def test_scores_that_are_not_finite(tmp_path):
    model = fresh()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate(model, Clips(4), CONFIG.labels)

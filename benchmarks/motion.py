"""Does a network learn the order of frames? Generated clips in which no single frame tells the class.

    python benchmarks/motion.py --quick              # three networks, small budget
    python benchmarks/motion.py --seeds 0 1 2        # every module, three seeds

Eight classes in four pairs; the second class of a pair is the first one backwards in time, and the test set
holds every clip together with its reverse. A network that does not see the order of frames is at exactly 50
% within a pair. Every clip is a real mp4 file (lossless: each frame and its twin in the reversed clip are
equal bit for bit), read, trained on and evaluated through the package's own data set, training loop and
evaluation.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from small_net import SmallNet
from timing import positive
from timm.models import register_model
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn
from torch.utils.data import DataLoader

from temporal_excite import VideoClassifier
from temporal_excite.training import ModelConfig, Recipe, RunOptions, build_model, evaluate, read_log, train
from temporal_excite.video import SegmentSampler, VideoDataset, read_annotations
from temporal_excite.video.transforms import Normalise

T, SIDE = 8, 32
ORDERS = ("forward", "reversed", "shuffled")
PAIRS = (
    ("right", "left"),
    ("clockwise", "counterclockwise"),
    ("approach", "recede"),
    ("disc then plus", "plus then disc"),
)
LABELS = tuple(name for pair in PAIRS for name in pair)
Axis = float | np.ndarray
MEAN, STD = (0.5,) * 3, (1 / 3,) * 3  # the network's input is 3 (v - 0.5)


# ---- the clips
class Painter:
    """Draws the clips of one random generator. Lengths are in sides of the frame, the centre is (0, 0)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        axis = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")

    def noise(self, cells: int, side: int) -> Tensor:
        """Smooth colour noise ``(3, side, side)`` in [0, 1]."""
        grid = torch.from_numpy(self.rng.random((1, 3, cells, cells), dtype=np.float32))
        return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].clamp(0, 1)

    def background(self) -> Tensor:
        """(3, SIDE, SIDE), still."""
        return (self.noise(5, 40) * 0.4 + 0.3)[:, 4:-4, 4:-4]

    def texture(self, halved: bool = False) -> Tensor:
        """(3, 24, 24): smooth noise on one of the eight corner colours; ``halved``: one half of it
        inverted."""
        color = torch.from_numpy(self.rng.integers(0, 2, (3, 1, 1)).astype(np.float32))
        texture = 0.4 * self.noise(4, 24) + 0.6 * color
        if halved:
            texture[:, :, 12:] = 1 - texture[:, :, 12:]
        return texture

    def paste(
        self, frames: Tensor, texture: Tensor, shape: str, x: Axis, y: Axis, radius: Axis, angle: Axis
    ) -> Tensor:
        """``frames`` ``(n, 3, SIDE, SIDE)`` with a textured shape at (x, y), soft at its edge; each number
        one for all frames, or ``(n,)``."""
        x, y, radius, angle = (
            torch.as_tensor(value, dtype=torch.float32).expand(len(frames))[:, None, None]
            for value in (x, y, radius, angle)
        )
        cos, sin = angle.cos(), angle.sin()
        dx, dy = self.x - x, self.y - y
        u, v = (cos * dx + sin * dy) / radius, (-sin * dx + cos * dy) / radius
        inside = {
            "disc": lambda: 1 - (u * u + v * v).sqrt(),
            "plus": lambda: torch.maximum(
                torch.minimum(1 - u.abs(), 0.35 - v.abs()), torch.minimum(0.35 - u.abs(), 1 - v.abs())
            ),
            "square": lambda: 0.85 - torch.maximum(u.abs(), v.abs()),
            "triangle": lambda: torch.minimum(0.5 - v, (1 + v - 1.732 * u.abs()) / 2),
        }[shape]()
        mask = torch.sigmoid(inside * radius * SIDE * 4)[:, None]  # about a pixel wide
        colors = F.grid_sample(
            texture.expand(len(frames), -1, -1, -1),
            torch.stack([u, v], dim=-1),
            padding_mode="border",
            align_corners=False,
        )
        return frames + mask * (colors - frames)

    def clip(self, pair: int) -> Tensor:
        """A clip of the first class of a pair, ``(T, 3, SIDE, SIDE)`` uint8."""
        rng = self.rng
        frames = self.background().expand(T, -1, -1, -1)
        texture = self.texture(halved=pair == 1)
        shapes = ("plus", "square", "triangle") if pair == 1 else ("disc", "plus", "square", "triangle")
        shape = shapes[rng.integers(len(shapes))]
        x, y = rng.uniform(-0.25, 0.25, 2)
        radius, angle = rng.uniform(0.14, 0.20), rng.uniform(0, 2 * np.pi)
        tc = np.arange(T) - (T - 1) / 2
        if pair == 0:
            speed = rng.uniform(0.05, 0.10)
            frames = self.paste(frames, texture, shape, 0.3 * x + speed * tc, y, radius, angle)
        elif pair == 1:
            turn = np.deg2rad(rng.uniform(15, 30))
            frames = self.paste(frames, texture, shape, 0.15 * x, 0.15 * y, 1.9 * radius, angle + turn * tc)
        elif pair == 2:
            growth = rng.uniform(0.09, 0.16)
            frames = self.paste(frames, texture, shape, x, y, 0.17 * np.exp(growth * tc), angle)
        else:  # bright disc in frame 2, dark plus in frame 5: further out the padding tells time
            frames = frames.clone()
            white, black = (torch.full((3, 24, 24), value) for value in (0.95, 0.05))
            frames[2:3] = self.paste(frames[2:3], white, "disc", x, y, radius, 0)
            frames[5:6] = self.paste(frames[5:6], black, "plus", *rng.uniform(-0.25, 0.25, 2), radius, angle)
        noise = torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32))
        return ((frames + 0.02 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def write_video(path: Path, clip: Tensor) -> None:
    """``(T, 3, H, W)`` uint8 as a lossless mp4 (x264 on RGB)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = clip.shape[3], clip.shape[2], "rgb24"
        for picture in clip.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def write_dataset(folder: Path, subset: str, clips: int, seed: int) -> None:
    """``clips`` videos of each class as mp4 files and their list ``<subset>.txt``; nothing if they are
    there. Raises ``ValueError`` where others are."""
    listing = folder / f"{subset}.txt"
    if listing.exists():
        if (there := len(listing.read_text().splitlines())) != clips * len(LABELS):
            raise ValueError(
                f"{listing} lists {there} clips, not {clips} for each of {len(LABELS)} classes: "
                "choose another --data folder"
            )
        return
    (folder / subset).mkdir(parents=True, exist_ok=True)
    painter = Painter(np.random.default_rng(seed))
    lines = []
    for number in range(clips):
        for pair in range(len(PAIRS)):
            clip = painter.clip(pair)
            for reverse in (0, 1):
                name = f"{subset}/{pair}_{number:05d}_{reverse}.mp4"
                write_video(folder / name, clip.flip(0) if reverse else clip)
                lines.append(f"{name} {T} {2 * pair + reverse}\n")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    write_whole(listing, "".join(lines))


# ---- the data set
class Order:
    """A sampler's frames in another order: the controls."""

    def __init__(self, order: str) -> None:
        self.sampler, self.order = SegmentSampler(T, "test"), order
        self.random = order == "shuffled"

    def __call__(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        frames = self.sampler(num_frames)
        if self.order == "reversed":
            return frames.flip(-1)
        if self.order == "shuffled":
            return frames[:, torch.randperm(T, generator=generator)]
        return frames


def open_dataset(folder: Path, subset: str, order: str = "forward") -> VideoDataset:
    """The clips of a subset, each one followed by its reverse."""
    records, labels = read_annotations(folder / f"{subset}.txt", "tsn", labels=LABELS)
    sampler = Order(order)
    transform = Normalise(MEAN, STD)
    return VideoDataset(records, sampler, transform, labels=labels, keep=not sampler.random)  # type: ignore[arg-type]


# ---- the network
def block_of(kind: str, channels: int, width: int) -> nn.Module:
    """A residual block that halves the frame."""
    down = downsample_conv(channels, width, kernel_size=1, stride=2)
    if kind == "basic":
        return BasicBlock(channels, width, stride=2, downsample=down)
    if kind == "bottleneck":
        return Bottleneck(channels, width // 4, stride=2, downsample=down)
    layers = {"norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU}
    return Bottle2neck(channels, width // 4, stride=2, downsample=down, base_width=64, scale=4, **layers)


class MotionNet(SmallNet):
    """Three residual blocks to 32, 64 and 128 channels."""

    WIDTHS = (32, 64, 128)

    def __init__(self, block: str = "basic", num_classes: int = 8) -> None:
        inputs = (16, *self.WIDTHS)
        blocks = [block_of(block, a, b) for a, b in pairwise(inputs)]
        super().__init__(blocks, self.WIDTHS[-1], num_classes)
        self.feature_info = [  # the blocks are stages 3 to 5
            {"num_chs": width, "reduction": 2 ** (i + 2), "module": f"blocks.{i}"}
            for i, width in enumerate(self.WIDTHS)
        ]


@register_model
def motion_net(pretrained: bool = False, **kwargs: Any) -> MotionNet:
    """The benchmark's network, under a name ``timm.create_model`` knows."""
    return MotionNet(**{key: kwargs[key] for key in ("block", "num_classes") if key in kwargs})


@dataclass(frozen=True)
class Contender:
    """One row of the benchmark."""

    title: str
    module: str | None
    module_args: dict[str, Any] = field(default_factory=dict)
    block: str = "basic"


CONTENDERS = {
    "tsn": Contender("TSN", None),
    "tsm": Contender("TSM", "tsm"),
    "tsm1": Contender("TSM, one block", "tsm", {"include": r"blocks\.1$"}),
    "shift": Contender("learnable shift", "shift"),
    "ste": Contender("STE", "ste"),
    "ce": Contender("CE", "ce"),
    "me": Contender("ME", "me"),
    "action": Contender("ACTION", "action"),
    "gates": Contender("STE + CE + ME, no shift", "action", {"shift": False}),
    "tea": Contender("TEA (Res2Net blocks)", "tea", block="res2net"),
    "tefe": Contender("TEFE (bottlenecks)", "tefe", {"te": (0, 1, 0, 0), "fe": (0, 0, 1, 1)}, "bottleneck"),
}
CONTENDERS |= {
    f"{name}-causal": replace(
        CONTENDERS[name],
        title=f"{CONTENDERS[name].title}, causal",
        module_args={**CONTENDERS[name].module_args, "causal": True},
    )
    for name in ("tsm", "shift", "ste", "ce", "me", "action", "tea", "tefe")
}
QUICK = ("tsn", "tsm", "action")
QUICK_BUDGET = (192, 256, 32)  # steps, training and test clips of each class


# ---- the runs
def budget(steps: int, batch: int, sets: Mapping[str, VideoDataset]) -> list[int]:
    """What a result depends on besides its name and seed: steps, batch, training and test clips."""
    return [steps, batch, len(sets["train"]), len(sets["forward"])]


def recipe(steps: int, batch: int, steps_per_epoch: int) -> Recipe:
    """AdamW, one learning rate for all, one cycle."""
    return Recipe(
        name="motion",
        dataset="motion",
        epochs=max(1, round(steps / steps_per_epoch)),
        lr=4e-3,
        batch_size={T: batch},
        weight_decay=0.05,
        dropout=0.0,
        n_segment=T,
        warmup=0.15,
        optimizer="adamw",
        clip_grad=None,
        bias_lr=1.0,
        head_lr=1.0,
        short_side=SIDE,
        crop=SIDE,
    )


def open_all(data: Path, clips: int, test_clips: int) -> dict[str, VideoDataset]:
    """The training set and the test set in each order, written first where they are not there yet.

    ``clips`` and ``test_clips``: of each class.
    """
    write_dataset(data, "train", clips, seed=1)
    write_dataset(data, "val", test_clips, seed=2)
    return {"train": open_dataset(data, "train")} | {o: open_dataset(data, "val", o) for o in ORDERS}


def within_pairs(scores: Tensor, targets: Tensor) -> list[float]:
    """For each pair, in percent: how often the clip's own class scores above the other class of its pair.

    A tie counts half.
    """
    own, other = (scores.gather(1, c[:, None])[:, 0] for c in (targets, targets ^ 1))
    right = (own > other).double() + 0.5 * (own == other).double()
    return [100 * right[targets // 2 == pair].mean().item() for pair in range(len(PAIRS))]


@torch.inference_mode()
def early(model: VideoClassifier, dataset: VideoDataset) -> list[list[float]]:
    """Accuracy within each pair after 1 .. T frames: by the running mean of a causal network's logits."""
    logits, targets = [], []
    for clips, target in DataLoader(dataset, 64):
        logits.append(model.model(model.frames(clips)).unflatten(0, (-1, T)).cumsum(dim=1))
        targets.append(target)
    scores = torch.cat(logits)
    return [within_pairs(scores[:, t], torch.cat(targets)) for t in range(T)]


def run(
    name: str,
    seed: int,
    sets: Mapping[str, VideoDataset],
    output: Path,
    steps: int,
    batch: int,
) -> None:
    """Train and test one contender; the result goes to ``output/<name>-<seed>.json``."""
    contender = CONTENDERS[name]
    torch.manual_seed(seed)
    config = ModelConfig(
        backbone="motion_net",
        module=contender.module,
        labels=LABELS,
        n_segment=T,
        dropout=0.0,
        module_args=contender.module_args,
        backbone_args={"block": contender.block},
        short_side=SIDE,
        crop=SIDE,
        mean=MEAN,
        std=STD,
    )
    model = build_model(config).to(memory_format=torch.channels_last)  # a third faster on the CPU
    # N(0, 0.001) is for pretrained features. From scratch it hides the classes' differences from the blocks:
    # after 550 steps the turns were still at 50 % (TSM); with this one all pairs are learnt after 220
    model.reset_head(len(LABELS), std=0.05)
    steps_per_epoch = len(sets["train"]) // batch
    started = time.process_time()
    done = train(
        model,
        config,
        recipe(steps, batch, steps_per_epoch),
        sets["train"],
        sets["forward"],
        output / f"{name}-{seed}",
        options=RunOptions(seed=seed, progress=False, log_every=25, group=2),
        resume=True,
    )
    if not done.finished:  # no SystemExit, which a pool of processes would wait for
        raise RuntimeError(f"{name} seed {seed} was stopped; the same command goes on")
    epochs = read_log(output / f"{name}-{seed}", "epoch")
    result: dict[str, Any] = {"name": name, "seed": seed, "steps": epochs[-1]["step"]}
    result["curve"] = [(line["step"], line["val_top1"]) for line in epochs]
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["train_cpu_seconds"] = time.process_time() - started
    for order in ORDERS:
        evaluation = evaluate(model, sets[order], LABELS, batch_size=64)
        result[order] = within_pairs(evaluation.scores, evaluation.targets)
        result[f"{order}_top1"] = evaluation.top1
        if order == "reversed":
            reverse = (evaluation.predictions == evaluation.targets ^ 1).double().mean().item()
            result["reversed_paired_top1"] = 100 * reverse
        if contender.module_args.get("causal"):
            result[f"{order}_early"] = early(model.eval(), sets[order])
    result["final_train_loss"] = epochs[-1]["train_loss"]
    result["budget"] = budget(steps, batch, sets)
    write_whole(output / f"{name}-{seed}.json", json.dumps(result) + "\n")


# ---- what came out
def load_results(output: Path, names: Iterable[str], seeds: Iterable[int]) -> dict[str, list[dict[str, Any]]]:
    """The results in a folder, by contender, in the order of the table."""
    files = {name: [output / f"{name}-{seed}.json" for seed in sorted(set(seeds))] for name in names}
    return {
        name: [json.loads(file.read_text()) for file in files[name]] for name in CONTENDERS if name in files
    }


def summary(values: Sequence[float]) -> str:
    """Mean, and the range over the seeds when there are several."""
    text = f"{np.mean(values):5.1f}"
    return text if len(values) == 1 else f"{text} [{min(values):.1f}, {max(values):.1f}]"


def table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Accuracy within each pair, its mean, and the controls, as Markdown."""
    heads = [" / ".join(pair) for pair in PAIRS]
    lines = [
        f"| | {' | '.join(heads)} | mean | reversed: own label | reversed: paired label | shuffled | seeds |",
        "|---" * (len(PAIRS) + 6) + "|",
    ]
    for name, runs in results.items():
        cells = [summary([r["forward"][pair] for r in runs]) for pair in range(len(PAIRS))]
        cells.append(summary([float(np.mean(r["forward"])) for r in runs]))
        cells.append(summary([float(np.mean(r["reversed"])) for r in runs]))
        cells.append(summary([100 - float(np.mean(r["reversed"])) for r in runs]))
        cells.append(summary([float(np.mean(r["shuffled"])) for r in runs]))
        lines.append(f"| {CONTENDERS[name].title} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def early_table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Mean of the pairs after each frame, as Markdown."""
    lines = [f"| frames seen | {' | '.join(str(t + 1) for t in range(T))} |", "|---" * (T + 1) + "|"]
    for name, runs in results.items():
        cells = [f"{np.mean([r['forward_early'][t] for r in runs]):.1f}" for t in range(T)]
        lines.append(f"| {CONTENDERS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_early(results: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against frames seen, a line a network: each pair; the mean of them with its controls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PAIRS) + 1, sharey=True)
    frames = np.arange(1, T + 1)
    for i, (name, runs) in enumerate(results.items()):
        curves = {
            order: np.array([r[f"{order}_early"] for r in runs]) for order in ORDERS
        }  # (seeds, T, pairs)
        for pair, ax in enumerate(axes[:-1]):
            values = curves["forward"][:, :, pair]
            ax.plot(frames, values.mean(axis=0), color=f"C{i}", label=CONTENDERS[name].title)
            ax.fill_between(frames, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15, lw=0)
        for order, style in zip(ORDERS, ("-", "--", ":"), strict=True):
            axes[-1].plot(frames, curves[order].mean(axis=(0, 2)), style, color=f"C{i}")
    for ax, title in zip(
        axes, [" /\n".join(pair) for pair in PAIRS] + ["mean; - - reversed,\n.. shuffled"], strict=True
    ):
        ax.set_title(title, fontsize=9)
        ax.set_xticks(frames)
        ax.set_ylim(-2, 104)
        ax.axhline(50, color="black", linewidth=0.8, linestyle="--")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy within the pair (%)")
    axes[len(axes) // 2].set_xlabel("frames seen")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot(results: Mapping[str, list[dict[str, Any]]], path: Path, data: Path) -> None:
    """A clip of each pair; accuracy within each pair; the controls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    axes = top.subplots(2, 2)
    clips = open_dataset(data, "val")
    for pair, ax in enumerate(axes.flat):
        clip, _ = clips[2 * pair]
        strip = (clip / 3 + 0.5).clamp(0, 1).permute(2, 0, 3, 1)  # (H, T, W, 3)
        strip = F.pad(strip, (0, 0, 0, 1), value=1.0).flatten(1, 2)
        ax.imshow(strip.numpy(), interpolation="nearest")
        ax.set_title(f"{PAIRS[pair][0]} \u2192      \u2190 {PAIRS[pair][1]}", fontsize=9)
        ax.set_axis_off()
    top.suptitle("Four pairs of classes; each is the other one backwards in time", fontsize=10)

    left, right = bottom.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    names = list(results)
    colors = [f"C{i}" for i in range(10)]
    groups = [(left, [" /\n".join(pair) for pair in PAIRS], lambda r: r["forward"])]
    groups.append((right, list(ORDERS), lambda r: [float(np.mean(r[order])) for order in ORDERS]))
    for ax, ticks, value in groups:
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            values = np.array([value(run) for run in results[name]])  # (seeds, ticks)
            mean = values.mean(axis=0)
            x = np.arange(len(ticks)) + (i - (len(names) - 1) / 2) * width
            spread = [mean - values.min(axis=0), values.max(axis=0) - mean]
            error = spread if len(values) > 1 else None
            color = colors[i % 10]
            ax.bar(x, mean, width * 0.92, yerr=error, color=color, label=CONTENDERS[name].title, capsize=2)
            ax.plot(x, mean, ".", color=color, markersize=3)  # a bar of 0 % is seen too
        ax.axhline(50, color="black", linewidth=0.8, linestyle="--")
        ax.set_xticks(range(len(ticks)), ticks, fontsize=8)
        ax.set_ylim(-2, 104)
        ax.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("accuracy within the pair (%)")
    left.set_title("test clips; dashed: no sense of order", fontsize=9)
    right.set_title("mean of the pairs, frames in order,\nreversed, shuffled", fontsize=9)
    bottom.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=positive, default=320)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--clips", type=positive, default=256, help="training clips of each class")
    parser.add_argument("--test-clips", type=positive, default=64, help="test clips of each class")
    parser.add_argument("--data", type=Path, default=Path("runs/motion-data"), help="folder of the clips")
    parser.add_argument("--output", type=Path, default=Path("runs/motion"), help="finished runs are kept")
    parser.add_argument("--only-data", action="store_true", help="write the clips and stop")
    parser.add_argument("--plot", type=Path, help="write the picture here (default: OUTPUT/motion.png)")
    parser.add_argument("--early", type=Path, help="the causal networks' picture (default: OUTPUT/early.png)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} with a small budget")
    parser.add_argument("--jobs", type=positive, default=1, help="processes, each with one thread")
    args = parser.parse_args()
    if not (args.only_data or args.quick or args.batch_size <= args.clips * len(LABELS)):
        parser.error(
            f"--batch-size must be 1 to {args.clips * len(LABELS)}, all clips; got {args.batch_size}"
        )
    if args.quick:
        args.modules, args.steps, args.clips, args.test_clips = list(QUICK), *QUICK_BUDGET
        args.data, args.output = Path("runs/motion-quick-data"), Path("runs/motion-quick")
        args.jobs = max(args.jobs, 2)
    started = time.perf_counter()
    torch.set_num_threads(1)
    sets = open_all(args.data, args.clips, args.test_clips)
    print(f"clips ready after {time.perf_counter() - started:.0f} s", flush=True)
    if args.only_data:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    pairs = [(name, seed) for seed in args.seeds for name in args.modules]
    asked, wanted = budget(args.steps, args.batch_size, sets), []
    for name, seed in pairs:
        kept = args.output / f"{name}-{seed}.json"
        if not kept.exists():
            wanted.append((name, seed))
        elif (found := json.loads(kept.read_text()).get("budget")) != asked:
            parser.error(
                f"{kept} is of the budget {found} (steps, batch, clips), not {asked}: remove it and the "
                f"folder {kept.with_suffix('')}, or choose another --output"
            )
    how = (sets, args.output, args.steps, args.batch_size)
    if args.jobs == 1:
        for name, seed in wanted:
            run(name, seed, *how)
            print(f"{name} seed {seed}: done after {time.perf_counter() - started:.0f} s", flush=True)
    else:
        for part in sets.values():
            for i in range(len(part) if part.keep else 0):
                part[i]  # decoded once, before the processes part
        context = multiprocessing.get_context("fork")
        with context.Pool(args.jobs, maxtasksperchild=1) as pool:
            pool.starmap(run, [(name, seed, *how) for name, seed in wanted], chunksize=1)
    results = load_results(args.output, args.modules, args.seeds)
    print(table(results))
    plot(results, args.plot or args.output / "motion.png", args.data)
    if causal := {name: runs for name, runs in results.items() if "forward_early" in runs[0]}:
        print(early_table(causal))
        plot_early(causal, args.early or args.output / "early.png")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()

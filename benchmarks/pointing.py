"""Do a trained network's maps lie on what moves? The pointing game on generated clips.

    python benchmarks/pointing.py        # TSN, TSM, ACTION, two seeds: about 4 minutes of one core

A clip shows two textured discs drawn from one distribution. One moves, and its direction (right, left, down,
up) is the class; the other stands still. No single frame tells which is which. After training, the class
activation map of the true class is compared with the two discs, on test clips of its own: the share of the
positive map on each, and how often a frame's maximum lies on each (pointing game, Zhang et al., ECCV 2016).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from small_net import SmallNet
from timing import positive
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor

import temporal_excite as te
from temporal_excite.visual import animation, cam, figure, overlay, unnormalise

T, SIDE, RADIUS = 8, 32, 5.0
CLASSES = ("right", "left", "down", "up")
STEPS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # (x, y)
MODULES = {"tsn": None, "tsm": "tsm", "action": "action"}
MEAN, STD = 0.5, 1 / 3


def clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``(N, T, 3, SIDE, SIDE)`` in [0, 1], classes ``(N,)``, and the discs ``(N, 2, T, SIDE, SIDE)``:
    mover, then the other."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    velocity = torch.tensor(STEPS, dtype=torch.float32)[labels] * (1.0 + rand(count, 1))  # pixels a frame
    travel = velocity * (T - 1)
    room = SIDE - 2 * RADIUS
    start = RADIUS + rand(count, 2) * (room - travel.abs()) - travel.clamp(max=0)
    time_axis = torch.arange(T)[None, :, None]
    mover = start[:, None] + velocity[:, None] * time_axis  # (N, T, 2)
    # the other disc: the candidate furthest from the mover's way
    candidates = RADIUS + rand(count, 64, 2) * room
    gaps = torch.cdist(candidates, mover).amin(dim=2)
    still = candidates[torch.arange(count), gaps.argmax(dim=1)]
    centers = torch.stack([mover, still[:, None].expand_as(mover)], dim=1)  # (N, 2, T, 2)

    axis = torch.arange(SIDE) + 0.5
    dx = axis[None, None, None, None] - centers[..., 0, None, None]
    dy = axis[None, None, None, :, None] - centers[..., 1, None, None]
    discs = (RADIUS - (dx * dx + dy * dy).sqrt() + 0.5).clamp(0, 1)  # soft over a pixel
    frames = F.interpolate(rand(count, 3, 5, 5), SIDE, mode="bicubic", align_corners=True)
    frames = (0.35 + 0.3 * frames)[:, None].expand(-1, T, -1, -1, -1)
    for i in range(2):
        texture = 0.6 * torch.randint(2, (count, 3, 1, 1), generator=generator) + 0.4 * F.interpolate(
            rand(count, 3, 3, 3), 16, mode="bicubic", align_corners=True
        )
        grid = torch.stack(torch.broadcast_tensors(dx[:, i], dy[:, i]), dim=-1) / RADIUS
        colors = F.grid_sample(
            texture.repeat_interleave(T, 0), grid.flatten(0, 1), padding_mode="border", align_corners=False
        ).unflatten(0, (count, T))
        mask = discs[:, i, :, None]
        frames = frames + mask * (colors - frames)
    noise = 0.02 * torch.randn(frames.shape, generator=generator)
    return (frames + noise).clamp(0, 1), labels, discs


def small_net() -> SmallNet:
    """Residual blocks to 24, 48 and 64 channels, at 8x8."""
    blocks, channels = [], 16
    for width, stride in ((24, 2), (48, 1), (64, 1)):
        down = downsample_conv(channels, width, kernel_size=1, stride=stride)
        blocks.append(BasicBlock(channels, width, stride=stride, downsample=down))
        channels = width
    return SmallNet(blocks, channels, len(CLASSES))


def build(module: str | None) -> te.VideoClassifier:
    """The network with a temporal module, in eval mode."""
    net = small_net()
    if module:
        te.inject(net, module, T)
    return te.VideoClassifier(net, n_segment=T, dropout=0.0).eval()


def train(module: str | None, seed: int, steps: int, batch: int = 16) -> te.VideoClassifier:
    """A network after ``steps`` batches of fresh clips: AdamW, one cycle."""
    torch.manual_seed(seed)
    model = build(module).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        frames, labels, _ = clips(batch, generator)
        optimizer.zero_grad()
        F.cross_entropy(model((frames - MEAN) / STD), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def point(model: te.VideoClassifier, frames: Tensor, labels: Tensor, discs: Tensor) -> dict[str, float]:
    """Accuracy, and the maps of the true class against the discs, all in percent."""
    inputs = (frames - MEAN) / STD
    with torch.no_grad():
        accuracy = (model(inputs).argmax(dim=1) == labels).double().mean().item()
    maps = cam(model, inputs, labels).clamp_min(0)
    maps = F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    share = (maps[:, None] * discs).sum(dim=(2, 3, 4)) / maps.sum(dim=(1, 2, 3)).clamp_min(1e-12)[:, None]
    path = discs[:, 0].amax(dim=1, keepdim=True)  # wherever the mover is in any frame
    on_path = ((maps * path).sum(dim=(1, 2, 3)) / maps.sum(dim=(1, 2, 3)).clamp_min(1e-12)).mean()
    # of frames with a positive map anywhere
    some = maps.flatten(2).amax(dim=2) > 0
    hits = (
        (discs > 0.5)
        .flatten(3)
        .gather(3, maps.flatten(2).argmax(dim=2)[:, None, :, None].expand(-1, 2, -1, 1))
    )
    pointed = (hits[..., 0] & some[:, None]).double().mean(dim=(0, 2))
    area = discs.mean(dim=(0, 2, 3, 4))
    return {
        "accuracy": 100 * accuracy,
        "share mover": 100 * share[:, 0].mean().item(),
        "share other": 100 * share[:, 1].mean().item(),
        "share mover's path": 100 * on_path.item(),
        "point mover": 100 * pointed[0].item(),
        "point other": 100 * pointed[1].item(),
        "area of a disc": 100 * area.mean().item(),
        "area of the path": 100 * path.mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--test-clips", type=positive, default=256)
    parser.add_argument("--example", type=int, default=0, help="test clip of the figure")
    parser.add_argument("--output", type=Path, default=Path("runs/pointing"), help="finished runs are kept")
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))
    if not 0 <= args.example < args.test_clips:
        parser.error(f"--example must be one of the {args.test_clips} test clips, got {args.example}")
    args.output.mkdir(parents=True, exist_ok=True)
    test = clips(args.test_clips, torch.Generator().manual_seed(10_000))
    shown = unnormalise(test[0][args.example])
    rows = {"input": shown}
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.modules:
        for seed in args.seeds:
            started, kept = time.process_time(), args.output / f"{name}-{seed}-{args.steps}.pt"
            if kept.exists():
                model = build(MODULES[name])
                model.load_state_dict(torch.load(kept, weights_only=True))
            else:
                model = train(MODULES[name], seed, args.steps)
                torch.save(model.state_dict(), kept.with_suffix(".tmp"))
                kept.with_suffix(".tmp").replace(kept)
            results.setdefault(name, []).append(point(model, *test))
            print(name, seed, {k: round(v, 1) for k, v in results[name][-1].items()}, end=" ")
            print(f"{time.process_time() - started:.0f} s of CPU", flush=True)
            if seed == args.seeds[0]:
                inputs = (test[0][args.example, None] - MEAN) / STD
                rows[name.upper()] = overlay(shown, cam(model, inputs, test[1][args.example, None]))
    (args.output / "pointing.json").write_text(json.dumps(results, indent=2) + "\n")
    title = f"class activation maps of {CLASSES[test[1][args.example]]!r}: one disc moves, one stands"
    figure(rows, args.output / "pointing.png", title=title)
    animation(rows, args.output / "pointing.gif")
    heads = list(results[args.modules[0]][0])
    print("| | " + " | ".join(heads) + " | seeds |\n|" + "---|" * (len(heads) + 2))
    for name, runs in results.items():
        cells = [
            f"{sum(v) / len(v):.1f} ({min(v):.1f} to {max(v):.1f})"
            for v in ([r[h] for r in runs] for h in heads)
        ]
        print(f"| {name.upper()} | {' | '.join(cells)} | {len(runs)} |")


if __name__ == "__main__":
    main()

"""``temporal-excite explain``."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...video import Record
from ...visual import animation, attention, cam, excitations, figure, grad_cam, overlay, unnormalise
from ...visual.pictures import ANIMATIONS, PICTURES, mask_rows
from ..checkpoint import ModelConfig
from ..data import test_dataset
from ..distributed import choose_device
from ..recognizer import Recognizer
from . import add_device_argument


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "checkpoint", help="best.pt of a run, a save_pretrained() folder, or hf-hub:owner/name"
    )
    parser.add_argument("video", type=Path, help="a video file, or a folder of numbered pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="CKPT",
        help="checkpoints with the same clips and classes, a row each",
    )
    parser.add_argument("--class", dest="target", metavar="NAME", help="default: each checkpoint's top class")
    parser.add_argument(
        "--method",
        choices=("grad-cam", "cam"),
        default="grad-cam",
        help="cam needs a linear classifier (default: grad-cam)",
    )
    parser.add_argument("--layer", metavar="NAME", help="of grad-cam (default: the last stage's output)")
    parser.add_argument(
        "--format", choices=[e[1:] for e in PICTURES], default="png", help="of the figures (default: png)"
    )
    parser.add_argument(
        "--animation", choices=[e[1:] for e in ANIMATIONS], default="gif", help="default: gif"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the top classes, write maps.*, and masks_K.* and attention_K.* where checkpoint K has gates."""
    if args.layer and args.method == "cam":
        raise ValueError("--layer goes with --method grad-cam: CAM is made of the last features")
    sources = [args.checkpoint, *args.compare]
    models = [Recognizer.from_checkpoint(source, choose_device(args.device)) for source in sources]
    config = models[0].config
    _check_comparable(sources, [model.config for model in models])
    target = None if args.target is None else _class_number(config, args.target)
    args.out.mkdir(parents=True, exist_ok=True)

    rows: dict[str, Tensor] = {}
    titles = []
    pictures: dict[str, Callable[..., object]] = {}  # drawn when everything is computed
    for number, (source, model) in enumerate(zip(sources, models, strict=True), 1):
        clip, _ = test_dataset([Record(args.video, 0)], model.config)[0]
        frames = unnormalise(clip, model.config.mean, model.config.std)
        rows.setdefault("input", frames)
        clip = clip.unsqueeze(0).to(model.device)
        with torch.no_grad():
            best = model.model(clip).softmax(dim=1)[0].topk(min(3, config.num_classes))
        top = ", ".join(
            f"{config.labels[i]} {100 * score:.0f} %"
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        name = f"{number}: {model.config.module or 'tsn'}" if args.compare else model.config.module or "tsn"
        titles.append(f"{name}: {top}")
        print(f"{source}\n  {top}")
        if args.method == "cam":
            maps = cam(model.model, clip, target)
        else:
            maps = grad_cam(model.model, clip, target, args.layer)
        rows[name] = overlay(frames, maps)
        try:
            gates = excitations(model.model, clip)
        except ValueError as error:
            print(f"  no excitation maps: {error}")
            continue
        if masks := mask_rows(gates, frames):
            shown = {"input": frames, **masks}
            pictures[f"masks_{number}.{args.format}"] = partial(figure, shown, title=titles[-1])
        if any(g.ndim == 3 for site in gates for g in site.gates.values()):
            pictures[f"attention_{number}.{args.format}"] = partial(attention, gates)
    title = "\n".join(titles) + ("" if target is None else f"\nmaps of {args.target!r}")
    pictures[f"maps.{args.format}"] = partial(figure, rows, title=title)
    pictures[f"maps.{args.animation}"] = partial(animation, rows)
    for name, draw in pictures.items():
        draw(path=args.out / name)
    print(f"wrote {', '.join(sorted(pictures))} to {args.out}")
    return 0


def _check_comparable(sources: Sequence[str], configs: Sequence[ModelConfig]) -> None:
    """Raise unless all checkpoints take the same clips and know the same classes."""
    first = configs[0]
    for source, config in zip(sources, configs, strict=True):
        for name in ("n_segment", "short_side", "crop", "labels"):
            ours, theirs = getattr(first, name), getattr(config, name)
            if ours != theirs:
                difference = "other classes" if name == "labels" else f"{name}={theirs}, not {ours}"
                raise ValueError(f"{source} cannot be compared with {sources[0]}: it has {difference}")


def _class_number(config: ModelConfig, label: str) -> int:
    if label not in config.labels:
        raise ValueError(
            f"--class {label!r} is none of the {config.num_classes} classes ({config.labels[0]!r}, ..)"
        )
    return config.labels.index(label)

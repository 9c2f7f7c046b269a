"""``temporal-excite evaluate``."""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..._extras import need
from ...complexity import count
from ...video import Record
from ..data import load_records, test_dataset
from ..distributed import join_world, leave_world
from ..evaluate import evaluate, parse_protocol
from ..recognizer import Recognizer
from . import add_data_arguments, add_device_argument


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "checkpoint", help="best.pt of a run, a save_pretrained() folder, or hf-hub:owner/name"
    )
    parser.add_argument(
        "--protocol",
        default="1x1",
        metavar="CROPSxCLIPS",
        help="1x1 is the papers' centre crop of one clip, 3x10 three full-height crops of ten (default: 1x1)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="clips in one pass (default: 16)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write result.json, predictions.csv and confusion.png here"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    add_device_argument(parser)
    add_data_arguments(parser, ("val",))


def run(args: argparse.Namespace) -> int:
    """Print the accuracies, write the files."""
    logging.basicConfig(format="%(message)s")
    crops, clips = parse_protocol(args.protocol)
    recognizer = Recognizer.from_checkpoint(args.checkpoint)
    model, config = recognizer.model, recognizer.config
    layout = args.format or config.dataset
    named = layout not in ("folder", "tsn", "kinetics", "hmdb51")  # the data name all classes themselves
    named |= layout == "tsn" and (args.data / "labels.txt").is_file()
    if layout in ("sthv1", "jester"):  # the newer csv names those it has videos of
        named = any((args.val_list.parent if args.val_list else args.data).glob("*labels.csv"))
    records, labels = load_records(
        args.data,
        layout,
        "val",
        listing=args.val_list,
        root=args.root,
        labels=args.labels or (None if named else config.labels),
    )
    if tuple(labels) != config.labels:
        raise ValueError(
            f"{args.data} has {len(labels)} classes ({labels[0]!r}, ..), {args.checkpoint} was trained on "
            f"{config.num_classes} others ({config.labels[0]!r}, ..): evaluate it on its own data set"
        )
    if args.output:
        need("matplotlib", "video", "pictures of the confusion matrix")
        args.output.mkdir(parents=True, exist_ok=True)
    views = crops * clips
    side = config.crop if crops == 1 else config.short_side
    flops = count(model, (config.n_segment, 3, side, side)).flops
    world = join_world(args.device)
    try:
        result = evaluate(
            model.to(world.device),
            test_dataset(records, config, args.protocol, on_error=args.on_error),
            config.labels,
            batch_size=args.batch_size,
            views=views,
            workers=args.workers,
            world=world,
            progress=args.progress,
        )
    finally:
        leave_world()
    if not world.main:
        return 0
    print(
        f"{len(result.targets)} videos, {config.n_segment} frames x {crops} crops x {clips} clips\n"
        f"Top-1 {result.top1:.2f} %  Top-5 {result.top5:.2f} %\n"
        f"{flops / 1e9:.3f} GFLOPs per view x {views} = {views * flops / 1e9:.3f} GFLOPs per video "
        f"(at {side}x{side}, one multiply-accumulate is one)"
    )
    if result.skipped:
        print(f"{result.skipped} unreadable videos left out")
    per_class = dict(zip(config.labels, result.per_class, strict=True))
    width = max(map(len, config.labels))
    for name, accuracy in per_class.items():
        print(f"  {name:<{width}}  " + ("no videos" if accuracy != accuracy else f"{accuracy:6.2f} %"))
    if args.output:
        summary = {
            "checkpoint": args.checkpoint,
            "protocol": args.protocol,
            "videos": len(result.targets),
            "skipped": result.skipped,
            "top1": result.top1,
            "top5": result.top5,
            "gflops_per_view": flops / 1e9,
            "gflops_per_video": views * flops / 1e9,
            "per_class": {k: None if v != v else v for k, v in per_class.items()},
        }
        (args.output / "result.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        result.write_csv(args.output / "predictions.csv", _names(records))
        result.plot_confusion(args.output / "confusion.png")
        print(f"wrote confusion.png, predictions.csv, result.json to {args.output}")
    return 0


def _names(records: Sequence[Record]) -> list[str]:
    """The records' paths, with first and last frame (counted from 1) where several records are of one."""
    several = Counter(record.path for record in records)
    names = []
    for record in records:
        end = "" if record.num_frames is None else record.start + record.num_frames
        frames = f" {record.start + 1}-{end}" if several[record.path] > 1 else ""
        names.append(f"{record.path}{frames}")
    return names

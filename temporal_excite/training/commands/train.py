"""``temporal-excite train``."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from ...video import normalisation
from ..checkpoint import ModelConfig, build_model
from ..data import load_records, test_dataset, train_dataset
from ..distributed import join_world, leave_world
from ..engine import AMP, RunOptions, train
from ..recipes import RECIPES, Recipe, get_recipe
from ..recognizer import load_initial
from . import add_data_arguments, add_device_argument, keyword


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.epilog = (
        "Under torchrun the same command trains in many processes. Stop with SIGTERM, go on with --resume."
    )
    model = parser.add_argument_group("model")
    model.add_argument("--recipe", required=True, metavar="NAME", help=f"one of {', '.join(sorted(RECIPES))}")
    model.add_argument(
        "--backbone", default="resnet50", metavar="NAME", help="timm model (default: resnet50)"
    )
    model.add_argument(
        "--module",
        default="action",
        metavar="NAME",
        help="temporal module, or tsn for none (default: action)",
    )
    model.add_argument(
        "--module-arg", type=keyword, action="append", default=[], metavar="NAME=VALUE", help="for inject()"
    )
    model.add_argument(
        "--backbone-arg",
        type=keyword,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for timm.create_model()",
    )
    model.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        help="start from random weights, not from timm's",
    )
    model.add_argument(
        "--init",
        metavar="CKPT",
        help="start from the weights of another run (best.pt, a save_pretrained() folder or "
        "hf-hub:owner/name), its classifier too where it has as many classes",
    )
    data = add_data_arguments(parser, ("train", "val"))
    data.add_argument(
        "--flip",
        choices=("auto", "none", "plain", "swap"),
        default="auto",
        help="mirrored clips: auto swaps the labels where class names say left and right, and mirrors none "
        "where they are only numbers (default: auto)",
    )
    change = parser.add_argument_group("instead of the recipe's values")
    change.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="milestones are scaled in proportion; those that coincide act once",
    )
    change.add_argument("--lr", type=float, help="default: the recipe's, scaled with the batch size")
    change.add_argument(
        "--batch-size", type=int, metavar="N", help="clips in one optimiser step, all processes"
    )
    change.add_argument("--weight-decay", type=float)
    change.add_argument("--dropout", type=float)
    change.add_argument("--n-segment", type=int, metavar="T", help="frames of a clip")
    change.add_argument("--short-side", type=int, metavar="PX")
    change.add_argument("--crop", type=int, metavar="PX")
    change.add_argument("--batch-norm", choices=("train", "partial", "frozen"))
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoints and log")
    run.add_argument("--resume", action="store_true", help="continue from DIR/last.pt, if it exists")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--accumulate", type=int, default=1, metavar="N", help="passes for one step (memory)")
    run.add_argument("--amp", choices=tuple(AMP), default="off", help="mixed precision (default: off)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="average the weights (timm)")
    run.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes (CUDA)")
    run.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="also save inside an epoch")
    run.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    run.add_argument("--evaluate-every", type=int, default=1, metavar="EPOCHS")
    run.add_argument("--tensorboard", action="store_true")
    run.add_argument("--no-progress", dest="progress", action="store_false")
    add_device_argument(run)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when finished, 143 when SIGTERM stopped it."""
    logging.basicConfig(format="%(message)s")
    recipe = _changed(get_recipe(args.recipe), args)
    layout = args.format or recipe.dataset
    data = {"root": args.root, "labels": args.labels}
    records, labels = load_records(args.data, layout, "train", listing=args.train_list, **data)
    data["labels"] = labels
    val_records, _ = load_records(args.data, layout, "val", listing=args.val_list, **data)
    config = ModelConfig(
        backbone=args.backbone,
        module=None if args.module == "tsn" else args.module,
        labels=tuple(labels),
        n_segment=recipe.n_segment,
        dropout=recipe.dropout,
        module_args=dict(args.module_arg),
        backbone_args=dict(args.backbone_arg),
        short_side=recipe.short_side,
        crop=recipe.crop,
        dataset=layout,
    )
    torch.manual_seed(args.seed)
    model = build_model(config, pretrained=args.pretrained and args.init is None)
    mean, std = normalisation(model)
    config = replace(config, mean=mean, std=std)
    if args.init is not None:
        load_initial(model, args.init)
    elif not args.pretrained:  # the default is for pretrained features, and learns slowly from none
        model.reset_head(config.num_classes, std=0.05)
    options = RunOptions(
        **{name: value for name, value in vars(args).items() if name in RunOptions.__dataclass_fields__}
    )
    world = join_world(args.device)
    try:
        result = train(
            model,
            config,
            recipe,
            train_dataset(records, config, flip=args.flip, on_error=args.on_error, seed=args.seed),
            test_dataset(val_records, config, on_error=args.on_error),
            args.output,
            options=options,
            world=world,
            resume=args.resume,
        )
    finally:
        leave_world()
    if world.main:
        if not result.finished:
            print(f"stopped; go on with --resume ({result.checkpoint})")
        elif result.evaluation is not None:
            e = result.evaluation
            print(f"Top-1 {e.top1:.2f} %  Top-5 {e.top5:.2f} %  ({len(e.targets)} videos)")
    return 0 if result.finished else 143


def _changed(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    names = ("weight_decay", "dropout", "n_segment", "short_side", "crop", "batch_norm")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.epochs is not None:
        changes["epochs"] = args.epochs
        moved = {max(1, round(m * args.epochs / recipe.epochs)) for m in recipe.milestones}
        changes["milestones"] = tuple(sorted(moved))  # one at or after the end never acts
    return replace(recipe, **changes)

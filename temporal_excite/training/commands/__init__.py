"""The command line's commands on models and videos."""

import argparse
import ast
import os
from pathlib import Path
from typing import Any


def add_data_arguments(parser: argparse.ArgumentParser, subsets: tuple[str, ...]) -> Any:
    """--data and what goes with it; their group."""
    from ..data import layouts

    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--format",
        choices=layouts(),
        help="its layout (docs/data.md); 'folder' is DIR/train/CLASS/video and DIR/val/CLASS/video",
    )
    for subset in subsets:
        group.add_argument(
            f"--{subset}-list", type=Path, metavar="FILE", help=f"annotations of the {subset} set"
        )
    group.add_argument("--root", type=Path, metavar="DIR", help="folder of the videos, if not the layout's")
    group.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line")
    group.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at a broken video, or leave it out and count it (default: raise)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="reading processes (default: %(default)s, up to 4)",
    )
    return group


def add_device_argument(parser: Any) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, .. (default: cuda where there is one)")


def keyword(text: str) -> tuple[str, Any]:
    """``"stages=(2,3)"`` is ``("stages", (2, 3))``; true and false are what they say in any case, and what is
    no Python literal stays a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value.title() if value.lower() in ("true", "false") else value)
    except (ValueError, SyntaxError):
        return name, value

"""``temporal-excite predict``."""

import argparse
import json
import sys

from ...video import VideoError
from ..distributed import choose_device
from ..evaluate import parse_protocol
from ..recognizer import Recognizer
from . import add_device_argument


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "checkpoint", help="best.pt of a run, a save_pretrained() folder, or hf-hub:owner/name"
    )
    parser.add_argument("video", nargs="+", help="video files, or folders of numbered pictures")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to show (default: 5)")
    parser.add_argument("--protocol", default="1x1", metavar="CROPSxCLIPS", help="default: 1x1")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the best classes; 2 when a video could not be read (the others are still done)."""
    parse_protocol(args.protocol)
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    recognizer = Recognizer.from_checkpoint(args.checkpoint, choose_device(args.device))
    failed = False
    for video in args.video:
        try:
            predictions = recognizer(video, args.top, args.protocol)
        except VideoError as error:
            print(f"temporal-excite predict: error: {error}", file=sys.stderr)
            failed = True
            continue
        if args.json:
            print(json.dumps({"video": video, "predictions": [[p.label, p.score] for p in predictions]}))
        else:
            print(video)
            for p in predictions:
                print(f"  {100 * p.score:6.2f} %  {p.label}")
    return 2 if failed else 0

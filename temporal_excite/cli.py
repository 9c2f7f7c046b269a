"""The command line: ``temporal-excite COMMAND``.

A command is a module with ``configure(parser)`` and ``run(args)``, and a line in ``COMMANDS``. It is
imported only when it is called.
"""

import argparse
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("temporal_excite.training.commands.train", "train a model on a folder of videos"),
    "evaluate": ("temporal_excite.training.commands.evaluate", "accuracy of a checkpoint by a test protocol"),
    "predict": ("temporal_excite.training.commands.predict", "labels of videos"),
    "watch": ("temporal_excite.training.commands.watch", "labels of a video or camera while it plays"),
    "explain": ("temporal_excite.training.commands.explain", "pictures of what a model looks at in a video"),
}
"""name -> (module, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for wrong input, or what the command gives."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    parser = argparse.ArgumentParser(
        prog="temporal-excite", description="Temporal modules in image models: train, evaluate, predict."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (path, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
        if name == chosen:
            importlib.import_module(path).configure(command)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command][0]).run(args) or 0
    except BrokenPipeError:  # whoever reads the output has seen enough, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if args.traceback:
            raise
        message = str(error)
        if re.match(r"Caught \w+ in DataLoader worker process", message):  # with the worker's traceback
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
        message = " ".join(message.split()) or type(error).__name__
        print(f"temporal-excite {args.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

"""Training, evaluation and prediction (``pip install temporal-excite[video]``)."""

from .checkpoint import (
    CheckpointError,
    ModelConfig,
    build_model,
    load_initial,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from .distributed import World, join_world, leave_world
from .engine import RunOptions, RunResult, train
from .evaluate import Evaluation, evaluate, parse_protocol
from .optim import freeze_batch_norm, param_groups
from .progress import read_log
from .recipes import RECIPES, Recipe, get_recipe

__all__ = [
    "RECIPES",
    "CheckpointError",
    "Evaluation",
    "ModelConfig",
    "Recipe",
    "RunOptions",
    "RunResult",
    "World",
    "build_model",
    "evaluate",
    "freeze_batch_norm",
    "get_recipe",
    "join_world",
    "leave_world",
    "load_initial",
    "load_model",
    "param_groups",
    "parse_protocol",
    "read_checkpoint",
    "read_log",
    "save_checkpoint",
    "train",
]

"""Training, evaluation and prediction (extra ``video``)."""

from .checkpoint import (
    CheckpointError,
    ModelConfig,
    build_model,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from .data import load_records, test_dataset, train_dataset
from .distributed import World, join_world, leave_world
from .engine import RunOptions, RunResult, train
from .evaluate import Evaluation, evaluate, parse_protocol
from .optim import freeze_batch_norm, param_groups
from .progress import read_log
from .recipes import RECIPES, Recipe, get_recipe
from .recognizer import LiveRecognizer, Prediction, Recognizer, load_initial

__all__ = [
    "RECIPES",
    "CheckpointError",
    "Evaluation",
    "LiveRecognizer",
    "ModelConfig",
    "Prediction",
    "Recipe",
    "Recognizer",
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
    "load_records",
    "param_groups",
    "parse_protocol",
    "read_checkpoint",
    "read_log",
    "save_checkpoint",
    "test_dataset",
    "train",
    "train_dataset",
]

"""Parameter groups as in the released code, the learning-rate schedule, frozen batch normalisation."""

from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..classifier import VideoClassifier, class_layers
from .recipes import Recipe

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def param_groups(model: VideoClassifier, lr: float, recipe: Recipe) -> list[dict[str, Any]]:
    """The trainable parameters in the groups of the released TSN, TSM and ACTION-Net code.

    ============================  ==========================  ==============================
    group                         learning rate               weight decay
    ============================  ==========================  ==============================
    weights                       lr                          weight_decay
    biases                        lr * bias_lr                0
    normalisation                 lr                          0
    last linear layer, weight     lr * head_lr                weight_decay * head_decay
    last linear layer, bias       lr * head_lr * bias_lr      0
    ============================  ==========================  ==============================
    """
    layers = class_layers(model.model)
    head_weights, head_biases = {id(m.weight) for m in layers}, {id(m.bias) for m in layers}
    norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    decay = recipe.weight_decay
    groups: dict[str, dict[str, Any]] = {
        "weights": {"lr": lr, "weight_decay": decay},
        "biases": {"lr": lr * recipe.bias_lr, "weight_decay": 0.0},
        "norms": {"lr": lr, "weight_decay": 0.0},
        "head weight": {"lr": lr * recipe.head_lr, "weight_decay": decay * recipe.head_decay},
        "head bias": {"lr": lr * recipe.head_lr * recipe.bias_lr, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in head_weights:
            kind = "head weight"
        elif id(parameter) in head_biases:
            kind = "head bias"
        elif id(parameter) in norms:
            kind = "norms"
        else:
            kind = "biases" if name.endswith("bias") else "weights"
        groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def create_optimizer(model: VideoClassifier, lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of the recipe over :func:`param_groups`."""
    groups = param_groups(model, lr, recipe)
    return timm.optim.create_optimizer_v2(
        groups, opt=recipe.optimizer, lr=lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )


def create_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> Scheduler:
    """The learning rate as a function of the number of optimiser steps done, for ``step_update(n)``."""
    total = recipe.epochs * updates_per_epoch
    warmup = round(recipe.warmup * total)
    common = {"warmup_t": warmup, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if recipe.milestones:
        # timm lets milestone m act at step m - 1
        decay_t = [m * updates_per_epoch + 1 for m in recipe.milestones]
        return MultiStepLRScheduler(
            optimizer, decay_t=decay_t, decay_rate=recipe.gamma, warmup_prefix=False, **common
        )
    return CosineLRScheduler(optimizer, t_initial=max(1, total - warmup), warmup_prefix=True, **common)


def freeze_batch_norm(model: nn.Module, mode: str) -> None:
    """Freeze batch normalisation; call it after every ``model.train()``.

    ``"train"``: none. ``"partial"``: all but the first (TSN, Sec. 3.2). ``"frozen"``: all. A frozen layer
    uses its running statistics and its weight and bias get no gradient.
    """
    if mode not in ("train", "partial", "frozen"):
        raise ValueError(f"batch_norm must be 'train', 'partial' or 'frozen', got {mode!r}")
    if mode == "train":
        return
    norms = [m for m in model.modules() if isinstance(m, _BATCH_NORMS)]
    for norm in norms[1 if mode == "partial" else 0 :]:
        norm.eval().requires_grad_(False)

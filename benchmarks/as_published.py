"""ACTION-Net's and TSM's modules step by step as their papers write them: what speed.py compares with.

Every path walks the full-size activations, convolutions in time run as such on copies with T last, and each
path is added up on its own. The weights are those of the package's modules.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from temporal_excite import ActionModule, TemporalShift
from temporal_excite.modules import TemporalConv


def use_published_forms(model: nn.Module) -> bool:
    """Let the ACTION and TSM modules of a model compute as published; False where it holds others, or forms
    that were not."""
    found = [m for m in model.modules() if isinstance(m, ActionModule | TemporalShift)]
    if any(module.causal or getattr(module, "identity_start", False) for module in found):
        return False
    for module in found:
        forward = action if isinstance(module, ActionModule) else part_shift
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return bool(found)


def part_shift(module: TemporalShift, x: Tensor) -> Tensor:
    """A fold of the channels from t+1, a fold from t-1, the rest from t."""
    clips, fold = rearrange(x, "(n t) c h w -> n t c h w", t=module.n_segment), module.fold
    y = torch.zeros_like(clips)
    y[:, :-1, :fold] = clips[:, 1:, :fold]
    y[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    y[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return y.flatten(0, 1)


def action(module: ActionModule, x: Tensor) -> Tensor:
    """Section 3 of ACTION-Net, with the shift, the ReLU and the norm that docs/fidelity.md lists."""
    t, (height, width) = module.n_segment, x.shape[2:]
    y = x
    if isinstance(module.shift, TemporalConv):
        series = rearrange(x, "(n t) c h w -> (n h w) c t", t=t)
        series = F.conv1d(series, module.shift.weight, padding=1, groups=x.shape[1])
        y = rearrange(series, "(n h w) c t -> (n t) c h w", h=height, w=width)
    outputs = []
    if "ste" in module.paths:  # Eqs. 1-3
        mean = rearrange(y.mean(1), "(n t) h w -> n 1 t h w", t=t)
        mask = F.conv3d(mean, module.ste.weight[None], padding=1).sigmoid()
        outputs.append(y + y * rearrange(mask, "n 1 t h w -> (n t) 1 h w"))
    if "ce" in module.paths:  # Eqs. 4-8
        squeezed = module.ce.squeeze(F.adaptive_avg_pool2d(y, 1))
        series = rearrange(squeezed, "(n t) r 1 1 -> n r t", t=t)
        mixed = rearrange(module.ce.act(module.ce.temporal(series)), "n r t -> (n t) r 1 1")
        outputs.append(y + y * module.ce.expand(mixed).sigmoid())
    if "me" in module.paths:  # Eq. 9
        features = module.me.norm(module.me.squeeze(y))
        moved = rearrange(module.me.transform(features), "(n t) r h w -> n t r h w", t=t)
        still = rearrange(features, "(n t) r h w -> n t r h w", t=t)
        motion = F.pad(moved[:, 1:] - still[:, :-1], (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
        outputs.append(y + y * module.me.expand(F.adaptive_avg_pool2d(motion, 1)).sigmoid())
    return sum(outputs[1:], outputs[0])

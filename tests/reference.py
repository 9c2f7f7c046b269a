"""ACTION-Net's and TSM's equations written out plainly, frame by frame. Slow on purpose; run in float64.

``first`` is the frame, counted from the present one, that the first of three taps meets: -1, or -2 in the
causal forms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_of(x: Tensor, n_segment: int) -> list[list[Tensor]]:
    """Clips as lists of frames ``(C, H, W)``."""
    return [[x[n * n_segment + t] for t in range(n_segment)] for n in range(len(x) // n_segment)]


def at(clip: list[Tensor], t: int) -> Tensor:
    """Frame t of a clip, zero beyond its ends."""
    return clip[t] if 0 <= t < len(clip) else torch.zeros_like(clip[0])


def stack(clips: list[list[Tensor]]) -> Tensor:
    return torch.stack([frame for clip in clips for frame in clip])


def first_tap(module: torch.nn.Module) -> int:
    return -2 if module.causal else -1


def temporal_conv(x: Tensor, weight: Tensor, n_segment: int, first: int = -1) -> Tensor:
    """y[t] = w0 x[t-1] + w1 x[t] + w2 x[t+1], per channel."""
    taps = [weight[:, 0, k].reshape(-1, 1, 1) for k in range(3)]
    return stack(
        [
            [sum(taps[k] * at(clip, t + k + first) for k in range(3)) for t in range(n_segment)]
            for clip in frames_of(x, n_segment)
        ]
    )


def part_shift(x: Tensor, fold: int, n_segment: int) -> Tensor:
    """Channels [0, fold) from t+1, [fold, 2 fold) from t-1, the rest from t (TSM)."""
    return stack(
        [
            [
                torch.cat([at(clip, t + 1)[:fold], at(clip, t - 1)[fold : 2 * fold], clip[t][2 * fold :]])
                for t in range(n_segment)
            ]
            for clip in frames_of(x, n_segment)
        ]
    )


def causal_shift(x: Tensor, fold: int, n_segment: int) -> Tensor:
    """Channels [0, fold) from t-1, the rest from t (uni-directional TSM)."""
    return stack(
        [
            [torch.cat([at(clip, t - 1)[:fold], clip[t][fold:]]) for t in range(n_segment)]
            for clip in frames_of(x, n_segment)
        ]
    )


def ste_gate(x: Tensor, weight: Tensor, n_segment: int, first: int = -1) -> Tensor:
    """sigmoid(K * mean over channels), K 3x3x3 with zero padding (Eqs. 1, 2)."""
    gates = []
    for clip in frames_of(x, n_segment):
        means = [frame.mean(0, keepdim=True) for frame in clip]
        for t in range(n_segment):
            taps = [
                F.conv2d(at(means, t + k + first)[None], weight[:, k : k + 1], padding=1)[0] for k in range(3)
            ]
            gates.append(torch.sigmoid(sum(taps)))
    return torch.stack(gates)


def ce_gate(
    x: Tensor,
    squeeze: Tensor,
    temporal: Tensor,
    expand: Tensor,
    n_segment: int,
    relu: bool = True,
    first: int = -1,
) -> Tensor:
    """sigmoid(K3 act(K2 * K1 mean over space)) (Eqs. 4-8)."""
    gates = []
    for clip in frames_of(x, n_segment):
        squeezed = [squeeze[:, :, 0, 0] @ frame.mean((1, 2)) for frame in clip]
        for t in range(n_segment):
            mixed = sum(temporal[:, :, k] @ at(squeezed, t + k + first) for k in range(3))
            mixed = torch.clamp(mixed, min=0) if relu else mixed
            gates.append(torch.sigmoid(expand[:, :, 0, 0] @ mixed)[:, None, None])
    return torch.stack(gates)


def batch_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """By batch statistics in training, by running ones otherwise; without a batch norm, x."""
    if isinstance(norm, torch.nn.Identity):
        return x
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    mean, var, weight, bias = (v.reshape(1, -1, 1, 1) for v in (mean, var, norm.weight, norm.bias))
    return (x - mean) / torch.sqrt(var + norm.eps) * weight + bias


def motion(
    x: Tensor,
    squeeze: Tensor,
    norm: torch.nn.BatchNorm2d,
    transform: Tensor,
    n_segment: int,
    causal: bool = False,
) -> Tensor:
    """mean over space of K * f[t+1] - f[t], zero at the last frame (Eq. 9; TEA, Eqs. 1-3).

    Causal: of K * f[t] - f[t-1], zero at the first.
    """
    features = batch_norm(torch.einsum("rc,bchw->brhw", squeeze[:, :, 0, 0], x), norm)
    pooled = []
    for clip in frames_of(features, n_segment):
        for t in range(n_segment):
            late = t if causal else t + 1
            if late in (0, n_segment):
                difference = torch.zeros_like(clip[t])
            else:
                ahead = F.conv2d(clip[late][None], transform, padding=1, groups=len(transform))[0]
                difference = ahead - clip[late - 1]
            pooled.append(difference.mean((1, 2)))
    return torch.stack(pooled)


def me_gate(
    x: Tensor,
    squeeze: Tensor,
    norm: torch.nn.BatchNorm2d,
    transform: Tensor,
    expand: Tensor,
    n_segment: int,
    causal: bool = False,
) -> Tensor:
    """sigmoid(K_expand F) with F the pooled motion."""
    pooled = motion(x, squeeze, norm, transform, n_segment, causal)
    return torch.sigmoid(pooled @ expand[:, :, 0, 0].T)[:, :, None, None]

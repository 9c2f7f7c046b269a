"""One small network of every family of timm that inject knows: what the robustness tests run."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from shapes import meta_model
from torch import Tensor, nn

import temporal_excite as te

T = 2
"""Frames of a clip; :func:`build` gives two clips."""


class Member(NamedTuple):
    """A member of a family: its name in timm, the side of its input, what makes it smaller than its name, and
    its dtype: float64 where the network is deep enough to blow float32's rounding up to the signal's size."""

    name: str
    size: int = 32
    smaller: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float32


FAMILIES = {
    "resnet": Member("resnet10t"),
    "resnetv2": Member("resnetv2_18"),
    "res2net": Member("res2net50_48w_2s"),
    "resnest": Member("resnest14d"),
    "sknet": Member("skresnet18"),
    "senet": Member("legacy_seresnet18"),
    "regnet": Member("regnetx_002"),
    "nfnet": Member("test_nfnet"),
    "byobnet": Member("test_byobnet"),
    "repvgg": Member("repvgg_a0"),
    "mobileone": Member("mobileone_s0"),
    "dla": Member("dla46_c"),
    "dpn": Member("dpn48b"),
    "cspnet": Member("cs3darknet_s"),
    "cspnext": Member("cspnext_tiny"),
    "tresnet": Member("tresnet_m"),
    "hrnet": Member("hrnet_w18_small"),
    "efficientnet": Member("efficientnet_b0"),
    "condconv": Member("efficientnet_cc_b0_4e"),
    "mixnet": Member("mixnet_s"),
    "mobilenetv2": Member("mobilenetv2_035"),
    "mobilenetv3": Member("mobilenetv3_small_050"),
    "mobilenetv4": Member("mobilenetv4_conv_small_035"),
    "hardcorenas": Member("hardcorenas_a"),
    "ghostnet": Member("ghostnet_050", 64),
    "ghostnetv3": Member("ghostnetv3_050", 64),
    "repghost": Member("repghostnet_050"),
    "rexnet": Member("rexnetr_100"),
    "lcnetv2": Member("lcnetv2_small"),
    "repvit": Member("repvit_m0_9"),
    "starnet": Member("starnet_s050"),
    "fasternet": Member("fasternet_t0"),
    "convnext": Member("test_convnext"),
    "inception_next": Member("inception_next_atto"),
    "convmixer": Member("convmixer_768_32"),
    "mambaout": Member("test_mambaout"),
    "metaformer": Member("poolformer_s12"),
    "focalnet": Member("focalnet_tiny_srf"),
    "fastvit": Member("fastvit_t8"),
    "xception_aligned": Member("xception41p"),
    "xception": Member("legacy_xception", 64),
    "densenet": Member("densenet121"),
    "rdnet": Member("rdnet_tiny"),
    "vovnet": Member("ese_vovnet19b_slim_dw"),
    "hgnet": Member("hgnetv2_b0"),
    "selecsls": Member("selecsls42"),
    "inception_v3": Member("inception_v3", 75),
    "inception_v4": Member("inception_v4", 75, dtype=torch.float64),
    "inception_resnet_v2": Member("inception_resnet_v2", 75, dtype=torch.float64),
    "nasnet": Member("nasnetalarge", 32, {"num_features": 192, "stem_size": 8}),
    "pnasnet": Member("pnasnet5large", 32),
    "vgg": Member("vgg11"),
    "maxxvit": Member("test_maxvit", 32, {"img_size": 32}),
    "tiny_vit": Member(
        "tiny_vit_5m_224",
        32,
        {
            "embed_dims": (8, 16, 16, 32),
            "depths": (2, 1, 1, 1),
            "num_heads": (1,) * 4,
            "window_sizes": (7, 4, 2, 1),
        },
    ),
    "iformer": Member(
        "iformer_t", 64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)}
    ),
    "shvit": Member(
        "shvit_s1", 64, {"embed_dim": (16, 32, 48), "partial_dim": (4, 8, 12), "depth": (1, 1, 1)}
    ),
    "efficientvit_mit": Member("efficientvit_b0", 64),
    "efficientvit_msra": Member(
        "efficientvit_m0",
        64,
        {
            "img_size": 64,
            "embed_dim": (16, 32, 48),
            "depth": (1, 1, 1),
            "key_dim": (4, 4, 4),
            "num_heads": (2, 2, 2),
            "window_size": (2, 2, 2),
        },
    ),
    "edgenext": Member("edgenext_xx_small", 64),
    "caformer": Member("caformer_s18", 64),
}


def meta(family: str, **kwargs: Any) -> nn.Module:
    """The family's member on the meta device."""
    member = FAMILIES[family]
    return meta_model(member.name, **member.smaller, **kwargs)


def build(
    family: str, module: str | None = "shift", causal: bool = False, double: bool = False, **kwargs: Any
) -> tuple[nn.Module, Tensor]:
    """The family's member in eval mode with a temporal module in each block, and two clips of T frames.

    Nothing is at an initial value that would hide a module: norms and layer scales, the modules' own weights,
    the batch norms' statistics.
    """
    name, size, smaller, dtype = FAMILIES[family]
    dtype = torch.float64 if double else dtype
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **smaller, **kwargs).eval().to(dtype)
    for key, p in model.named_parameters():
        if (p.ndim <= 1 and not key.endswith("bias")) or "gamma" in key or "gain" in key:
            p.data.uniform_(0.5, 1)
    x = torch.randn(2 * T, 3, size, size, dtype=dtype)
    if module:
        te.inject(model, module, T, causal=causal)
        randomise(model)
    settle(model, x)
    return model, x


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Take the batch norms' statistics from ``x``: by their initial ones a deep network's signal dies out,
    and any two outputs are the same."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.train()
        m.momentum = 1.0
    model(x)
    for m in norms:
        m.eval()


def randomise(model: nn.Module) -> None:
    """Draw the temporal modules' weights anew: some start as the identity."""
    for site in te.sites(model):
        for p in site.module.parameters():
            nn.init.normal_(p, std=0.3)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    """Equal, relative to the largest value."""
    assert a.isfinite().all() and b.isfinite().all()
    return bool((a - b).abs().max() <= tolerance * b.abs().max())

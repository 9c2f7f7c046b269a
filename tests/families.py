"""One small network of every family of timm that inject knows: what the robustness tests run."""

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from shapes import meta_model
from timm.models.byobnet import ByoBlockCfg
from torch import Tensor, nn

import temporal_excite as te
from temporal_excite.hosts import find_blocks

T = 2
"""Frames of a clip; :func:`build` gives two clips."""


class Pass(nn.Module):
    """Stands where a block was left out; of a cell's two inputs it gives the first. No view: what follows
    may work in place."""

    def forward(self, x: Any, *_: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x


class Member(NamedTuple):
    """A member of a family: its name in timm, the side of its input, keywords that make it smaller, and the
    blocks left out (a regular expression of their names; others of their class and width stay)."""

    name: str
    size: int = 32
    smaller: Mapping[str, Any] = MappingProxyType({})
    without: str = ""


REP = tuple(ByoBlockCfg("rep", d=d, c=c, gs=0) for d, c in ((2, 16), (1, 24), (1, 32), (1, 48)))
ONE = tuple(
    ByoBlockCfg("one", d=d, c=c, gs=gs, block_kwargs={"num_conv_branches": 2})
    for d, c, gs in ((1, 16, 0), (1, 16, 1), (1, 24, 0), (1, 32, 0))
)
BOTNET = tuple(
    ByoBlockCfg(kind, d=1, c=c, s=stride, gs=0, br=0.25, self_attn_kwargs={"num_heads": 2})
    for kind, c, stride in (("bottle", 32, 1), ("self_attn", 48, 2), ("bottle", 64, 2), ("self_attn", 64, 2))
)
THIN = {"layers": (2, 1, 1, 1), "channels": (16, 32, 64, 64)}

FAMILIES = {
    "resnet": Member("resnet10t", smaller={"channels": (16, 32, 64, 64)}),
    "resnetv2": Member("resnetv2_18", smaller=THIN),
    "res2net": Member("res2net50_48w_2s", smaller=THIN),
    "resnest": Member("resnest14d", smaller=THIN),
    "sknet": Member("skresnet18", smaller=THIN),
    "senet": Member("legacy_seresnet18", smaller={"layers": (2, 1, 1, 1)}),
    "regnet": Member("regnetx_002", smaller={"depth": 7, "w0": 16}),
    "nfnet": Member("test_nfnet"),
    "byobnet": Member("test_byobnet"),
    "byoanet": Member("botnet26t_256", 64, {"blocks": BOTNET, "img_size": 64}),
    "mobilevit": Member("mobilevit_xxs", 64),
    "repvgg": Member("repvgg_a0", smaller={"blocks": REP, "stem_chs": 16}),
    "mobileone": Member("mobileone_s0", smaller={"blocks": ONE, "stem_chs": 16}),
    "dla": Member("dla46_c"),
    "dpn": Member("dpn48b", smaller={"k_sec": (1, 2, 1, 1)}),
    "cspnet": Member("cs3darknet_s"),
    "cspnext": Member("cspnext_tiny"),
    "tresnet": Member("tresnet_m", smaller={"layers": (1, 2, 2, 1), "width_factor": 0.25}),
    "hrnet": Member("hrnet_w18_small", without=r"stage4\.0"),
    "efficientnet": Member("test_efficientnet"),
    "condconv": Member("efficientnet_cc_b0_4e", without=r"blocks\.(3\.[12]|4\.2|5\.[23])"),
    "mixnet": Member("mixnet_s", without=r"blocks\.[234]\.[2-9]"),
    "mobilenetv2": Member("mobilenetv2_035", without=r"blocks\.[2345]\.[2-9]"),
    "mobilenetv3": Member("mobilenetv3_small_050"),
    "mobilenetv4": Member("mobilenetv4_conv_small_035"),
    "mobilenetv5": Member(
        "mobilenetv5_base", 64, {"num_features": 64}, without=r"blocks\.[123]\.([2-9]|1\d)"
    ),
    "hardcorenas": Member("hardcorenas_a"),
    "ghostnet": Member("ghostnet_050", 64, without=r"blocks\.(6\.[12]|8\.[123])"),
    "ghostnetv3": Member("ghostnetv3_050", 64, without=r"blocks\.(6\.[12]|8\.[123])"),
    "repghost": Member("repghostnet_050", without=r"blocks\.(6\.[12]|8\.[123])"),
    "rexnet": Member("rexnetr_100", smaller={"depth_mult": 0.5}),
    "lcnetv2": Member("lcnetv2_small", smaller={"depths": (1, 2, 2, 1), "scale": 0.25}),
    "repvit": Member("repvit_m0_9", smaller={"embed_dim": (16, 24, 32, 48), "depth": (2, 1, 2, 1)}),
    "starnet": Member("starnet_s050", smaller={"depths": (2, 1, 2, 1)}),
    "fasternet": Member("fasternet_t0", smaller={"depths": (1, 2, 2, 1)}),
    "convnext": Member("test_convnext"),
    "inception_next": Member("inception_next_atto", smaller={"depths": (1, 1, 2, 1)}),
    "convmixer": Member("convmixer_768_32", without=r"blocks\.([4-9]|\d\d)"),
    "mambaout": Member("test_mambaout"),
    "metaformer": Member("poolformer_s12", 64, without=r"stages\.(2\.blocks\.[2-5]|3\.blocks\.1)"),
    "caformer": Member("caformer_s18", 64, without=r"stages\.(2\.blocks\.[2-9]|3\.blocks\.1)"),
    "focalnet": Member("focalnet_tiny_srf", 64, without=r"layers\.(2\.blocks\.[2-5]|3\.blocks\.1)"),
    "fastvit": Member("fastvit_t8", smaller={"layers": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)}),
    "xception_aligned": Member("xception41p", without=r"blocks\.([4-9]|10)"),
    "xception": Member("legacy_xception", 64, without=r"block([5-9]|1[01])"),
    "densenet": Member("densenet121", smaller={"block_config": (2, 2, 3, 2)}),
    "rdnet": Member("rdnet_tiny", smaller={"num_blocks_list": (1, 2, 1, 1, 1, 1, 1)}),
    "vovnet": Member("ese_vovnet19b_slim_dw"),
    "hgnet": Member("hgnetv2_b0"),
    "selecsls": Member("selecsls42"),
    "inception_v3": Member("inception_v3", 75, without=r"Mixed_(5d|6[cde]|7c)"),
    "inception_v4": Member("inception_v4", 75, without=r"features\.([789]|1[2-7]|2[01])"),
    "inception_resnet_v2": Member("inception_resnet_v2", 75, without=r"repeat(_[12])?\.([1-9]|1\d)"),
    "nasnet": Member(
        "nasnetalarge", 32, {"num_features": 192, "stem_size": 8}, r"cell_([2-5]|[89]|1[01]|1[4-7])"
    ),
    "pnasnet": Member("pnasnet5large", without=r"cell_([2367]|1[01])"),
    "vgg": Member("vgg11", smaller={"mlp_ratio": 0.02}),
    "maxxvit": Member("test_maxvit", smaller={"img_size": 32}),
    "tiny_vit": Member(
        "tiny_vit_5m_224",
        smaller={
            "embed_dims": (8, 16, 16, 32),
            "depths": (2, 1, 1, 1),
            "num_heads": (1, 1, 1, 1),
            "window_sizes": (7, 4, 2, 1),
        },
    ),
    "iformer": Member(
        "iformer_t", 64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)}
    ),
    "shvit": Member(
        "shvit_s1", 64, {"embed_dim": (16, 32, 48), "partial_dim": (4, 8, 12), "depth": (1, 1, 1)}
    ),
    "efficientvit_mit": Member("efficientvit_b0", 64, {"depths": (1, 1, 1, 1, 1), "head_widths": (64, 64)}),
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
    "edgenext": Member("edgenext_xx_small", 64, {"depths": (1, 2, 2, 1)}),
    "cpubone": Member("cpubone_nano", 64, {"head_widths": (64, 64)}),
    "lowformer": Member("lowformer_b0", 64, {"depth_list": (0, 1, 1, 1, 1), "head_widths": (64, 64)}),
    "csatv2": Member("csatv2", 128, {"depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "efficientformer": Member(
        "efficientformer_l1", 224, {"depths": (2, 1, 1, 2), "embed_dims": (16, 24, 32, 48)}
    ),
    "efficientformer_v2": Member("efficientformerv2_s0", 64, {"img_size": 64}),
    "gcvit": Member("gcvit_xxtiny", 64, {"img_size": 64, "embed_dim": 16}, r"stages\.2\.blocks\.[2-5]"),
    "nextvit": Member("nextvit_small", 64, {"depths": (1, 1, 5, 1)}),
    "swiftformer": Member("swiftformer_xs", 64, {"layers": (2, 2, 2, 2)}),
    "visformer": Member("visformer_tiny", 64, {"img_size": 64, "depth": (2, 1, 1), "embed_dim": 48}),
    "vision_transformer_hybrid": Member(
        "vit_small_r26_s32_224", 64, {"img_size": 64, "embed_dim": 48, "depth": 1}
    ),
    "vitamin": Member("vitamin_small_224", 64, {"img_size": 64, "depth": 1}),
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
    name, size, smaller, without = FAMILIES[family]
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **smaller, **kwargs).to(dtype)
    for path, _ in list(model.named_modules()):
        if without and re.fullmatch(without, path):
            model.set_submodule(path, Pass().train(model.training))
    x = torch.randn(2 * T, 3, size, size, dtype=dtype)
    thin(model.eval(), x)
    for key, p in model.named_parameters():
        if (p.ndim <= 1 and not key.endswith("bias")) or "gamma" in key or "gain" in key:
            p.data.uniform_(0.5, 1)
    if module:
        te.inject(model, module, T, causal=causal)
        randomise(model)
    settle(model, x)
    return model, x


@torch.no_grad()
def thin(model: nn.Module, x: Tensor) -> None:
    """Leave out the blocks that are built like a later one, where the shape allows it and two are left: two
    of a kind tell no more than one, and tracing takes its time by the block."""
    same_shape: list[tuple[str, object]] = []

    def look(block: nn.Module, args: tuple[Any, ...], output: Any, path: str) -> None:
        if isinstance(output, Tensor) and isinstance(args[0], Tensor) and output.shape == args[0].shape:
            same_shape.append((path, [(name, type(m)) for name, m in block.named_modules()]))

    blocks = find_blocks(model)
    hooks = [b.module.register_forward_hook(partial(look, path=b.name)) for b in blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    kept: list[object] = []
    for path, kind in reversed(same_shape):
        if kind in kept and len(kept) > 1:
            model.set_submodule(path, Pass().train(model.training))
        else:
            kept.append(kind)


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

"""BNInception (Inception-v2), the Inception backbone of ACTION-Net, TSN and TSM.

Ioffe, Szegedy: Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift, ICML 2015, Figure 5, as its Caffe model and that model's PyTorch port have it: every convolution has
a bias and is followed by batch norm and ReLU, and the average pools keep their zero padding in the mean.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

# block: (1x1; 3x3 reduce, 3x3; double 3x3 reduce, its two 3x3; pool projection, pool), the paper's Figure 5.
# Blocks without 1x1 halve the resolution; their pool branch is the pooled input.
_BLOCKS = {
    "inception_3a": (64, (64, 64), (64, 96), 32, "avg"),
    "inception_3b": (64, (64, 96), (64, 96), 64, "avg"),
    "inception_3c": (0, (128, 160), (64, 96), 0, "max"),
    "inception_4a": (224, (64, 96), (96, 128), 128, "avg"),
    "inception_4b": (192, (96, 128), (96, 128), 128, "avg"),
    "inception_4c": (160, (128, 160), (128, 160), 128, "avg"),
    "inception_4d": (96, (128, 192), (160, 192), 128, "avg"),
    "inception_4e": (0, (128, 192), (192, 256), 0, "max"),
    "inception_5a": (352, (192, 320), (160, 224), 128, "avg"),
    "inception_5b": (352, (192, 320), (192, 224), 128, "max"),
}

Conv = Callable[..., nn.Module]
"""``conv(in, out, kernel_size, stride=1)``: convolution, batch norm, ReLU."""


class HalvingPool(nn.Module):
    """Max pool 3x3 of stride 2 to ``ceil(size / 2)``, so that it meets the strided convolutions beside it.

    For even sizes this is Caffe's pool without padding; for odd ones Caffe's gives one row less and
    does not fit the other branches.
    """

    def forward(self, x: Tensor) -> Tensor:
        odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        return F.max_pool2d(F.pad(x, odd, value=float("-inf")) if any(odd) else x, 3, 2, ceil_mode=True)


class ReduceConv(nn.Module):
    """A 1x1 convolution, then a 3x3 one."""

    def __init__(
        self, in_channels: int, reduced: int, out_channels: int, conv: Conv, stride: int = 1
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.reduce = conv(in_channels, reduced, 1)
        self.conv = conv(reduced, out_channels, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.reduce(x))


class InceptionBlock(nn.Module):
    """The concatenation of up to four branches: 1x1, 3x3, two 3x3 in a row, and pool.

    Args:
        in_channels: channels of the input.
        conv1x1: channels of the 1x1 branch; 0 makes a block of stride 2 that has no such branch and whose
            pool branch is the pooled input.
        conv3x3: channels of the 3x3 branch, (reduced, out).
        double3x3: channels of the branch of two 3x3, (reduced, out).
        pool_proj: channels the pool branch is projected to.
        pool: ``"avg"`` or ``"max"``.
        conv: see :data:`Conv`.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        conv3x3: tuple[int, int],
        double3x3: tuple[int, int],
        pool_proj: int,
        pool: str,
        conv: Conv,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = conv1x1 + conv3x3[1] + double3x3[1] + (pool_proj or in_channels)
        stride = 1 if conv1x1 else 2
        self.branch1x1 = conv(in_channels, conv1x1, 1) if conv1x1 else None
        self.branch3x3 = ReduceConv(in_channels, *conv3x3, conv=conv, stride=stride)
        reduced, out = double3x3
        self.double3x3 = nn.Sequential(
            OrderedDict(
                reduce=conv(in_channels, reduced, 1),
                conv1=conv(reduced, out, 3),
                conv2=conv(out, out, 3, stride=stride),
            )
        )
        if stride == 2:
            self.pool: nn.Module = HalvingPool()
        else:
            self.pool = nn.AvgPool2d(3, 1, 1) if pool == "avg" else nn.MaxPool2d(3, 1, 1)
        self.pool_proj = conv(in_channels, pool_proj, 1) if pool_proj else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch3x3(x), self.double3x3(x), self.pool_proj(self.pool(x))]
        if self.branch1x1 is not None:
            branches.insert(0, self.branch1x1(x))
        return torch.cat(branches, dim=1)


class BNInception(nn.Module):
    """BNInception with timm's interface.

    The released networks were trained on 224x224 frames in the channel order B, G, R; other sizes work, even
    if they are no multiple of 32. Blocks are ``inception_3a`` .. ``inception_5b``; in ``feature_info`` a
    block that halves the resolution (3c, 4e) opens the next stage, as in timm's ResNets.

    Args:
        num_classes: classes; 0 gives the pooled features.
        in_chans: channels of the input.
        global_pool: as in ``timm.layers.SelectAdaptivePool2d``.
        drop_rate: dropout before the classifier.
        bn_momentum: of the batch norms' running statistics. 0.9, the new batch counting 0.9, is the released
            code's; PyTorch's own default is 0.1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        bn_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        conv = partial(ConvNormAct, bias=True, norm_kwargs={"momentum": bn_momentum})
        self.conv1 = conv(in_chans, 64, 7, stride=2)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = ReduceConv(64, 64, 192, conv)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        channels = 192
        for name, layout in _BLOCKS.items():
            block = InceptionBlock(channels, *layout, conv=conv)
            self.add_module(name, block)
            channels = block.out_channels
        self.num_features = self.head_hidden_size = channels
        self.feature_info = [
            {"num_chs": 64, "reduction": 2, "module": "conv1"},
            {"num_chs": 192, "reduction": 4, "module": "conv2"},
            {"num_chs": 320, "reduction": 8, "module": "inception_3b"},
            {"num_chs": 608, "reduction": 16, "module": "inception_4d"},
            {"num_chs": 1024, "reduction": 32, "module": "inception_5b"},
        ]
        self.global_pool, self.head_drop, self.fc = create_classifier(
            channels, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: the stem, then the blocks in order (or the stages)."""
        if coarse:
            return {"stem": r"^conv\d", "blocks": r"^inception_(\d)"}
        matchers = [(rf"^{name}\.", (index,)) for index, name in enumerate(_BLOCKS)]
        return {"stem": r"^conv\d", "blocks": matchers}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the inception blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and another global pool if given."""
        self.num_classes = num_classes
        like = self.conv1.conv.weight
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
        )
        self.fc.to(like.device, like.dtype).train(self.training)
        self.global_pool.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` -> ``(B, 1024, H/32, W/32)``."""
        x = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        blocks = [self.get_submodule(name) for name in _BLOCKS]
        if self.grad_checkpointing:
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout, and the classifier unless ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def caffe_names(layer: str) -> tuple[str, ...]:
    """The names a layer of :class:`BNInception` has in Caffe-named weight files.

    ``inception_3a.branch3x3.reduce.conv`` is ``inception_3a_3x3_reduce`` there, its batch norm
    ``inception_3a_3x3_reduce_bn``; the classifier is ``fc`` or, in newer files, ``last_linear``.
    """
    if layer == "fc":
        return "fc", "last_linear"
    path, _, kind = layer.rpartition(".")
    if path == "conv1":
        path = "conv1_7x7_s2"
    path = re.sub(r"^conv2\.", "conv2_3x3.", path)
    path = (
        path.replace(".branch1x1", "_1x1").replace(".branch3x3", "_3x3").replace(".pool_proj", "_pool_proj")
    )
    path = path.replace(".double3x3.conv", "_double_3x3_").replace(".double3x3.", "_double_3x3_")
    path = path.removesuffix(".conv").replace(".reduce", "_reduce")
    return (path + ("_bn" if kind == "bn" else ""),)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Caffe-named ImageNet weights under our names; batch-norm tensors of shape (1, C) become (C,)."""
    if "conv1_7x7_s2.weight" not in state_dict:
        return state_dict
    out = {}
    for key in model.state_dict():
        layer, _, tensor = key.rpartition(".")
        for name in caffe_names(layer):
            if (value := state_dict.get(f"{name}.{tensor}")) is not None:
                out[key] = value.squeeze(0) if value.ndim == 2 and "_bn" in name else value
    return out


default_cfgs = generate_default_cfgs(
    {
        # timm hosts no weights for it. The released ones take 0..255 minus the mean, channels B, G, R.
        "bninception": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (104 / 255, 117 / 255, 128 / 255),
            "std": (1 / 255, 1 / 255, 1 / 255),
            "first_conv": "conv1.conv",
            "classifier": "fc",
        }
    }
)


@register_model
def bninception(pretrained: bool = False, **kwargs: Any) -> BNInception:
    """BNInception, ``timm.create_model("bninception")`` once :mod:`temporal_excite` is imported.

    timm has no weights for it, so ``pretrained=True`` alone is an error. A Caffe-named ImageNet file loads
    with ``timm.create_model("bninception", pretrained=True, pretrained_cfg_overlay={"file": path})``.
    """
    return build_model_with_cfg(
        BNInception, "bninception", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )

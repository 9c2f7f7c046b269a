"""BNInception: the published network, timm's interface, and Caffe-named weights."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from timm.models import group_parameters
from torch import nn

import temporal_excite as te
from temporal_excite.models import BNInception
from temporal_excite.models.bninception import InceptionBlock


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("bninception", num_classes=5, **kwargs)


def test_parameters_and_flops():
    model = timm.create_model("bninception", num_classes=83).eval()
    assert isinstance(model, BNInception)
    assert sum(p.numel() for p in model.parameters()) == 10_355_315
    # per frame; fvcore traces, so the smallest batch will do
    counted = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
    assert round(8 * counted.total() / 1e9, 3) == 16.313


@pytest.mark.parametrize("size", [32, 33, 47, 64])
def test_any_size(size):
    model = tiny().eval()
    side = math.ceil(size / 2) // 2 // 2  # the stem's convolution rounds up, its pools down
    side = math.ceil(math.ceil(side / 2) / 2)  # 3c and 4e round up
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, size, size)).shape[2:] == (side, side)


def test_pool_of_strided_blocks_is_caffes_for_even_sizes():
    pool = InceptionBlock(8, 0, (4, 4), (4, 4), 0, "max", conv=lambda i, o, k, stride=1: nn.Identity()).pool
    x = torch.randn(2, 8, 6, 10)
    assert torch.equal(pool(x), F.max_pool2d(x, 3, 2, ceil_mode=True))
    odd = torch.randn(2, 8, 7, 5)
    assert torch.equal(pool(odd), F.max_pool2d(F.pad(odd, (0, 1, 0, 1), value=-1e9), 3, 2, ceil_mode=True))


def test_timm_interface():
    model = tiny(in_chans=4, drop_rate=0.3).eval()
    assert (model.num_classes, model.in_chans, model.num_features, model.drop_rate) == (5, 4, 1024, 0.3)
    x = torch.randn(2, 4, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 1024)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7)
    assert (model.num_classes, model.global_pool.pool_type) == (7, "max")
    model.double().reset_classifier(0)
    assert torch.equal(model(x.double()), model.forward_features(x.double()).amax((2, 3)))


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for bninception"):
        timm.create_model("bninception", pretrained=True)


def test_features_only():
    model = tiny(features_only=True, out_indices=(1, 2, 3, 4))
    x = torch.zeros(1, 3, 64, 64)
    for feature, channels, reduction in zip(
        model(x), model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 64 // reduction, 64 // reduction)


def test_group_matcher_names_every_parameter():
    model = tiny()
    fine = group_parameters(model, model.group_matcher())
    assert len(fine) == 12  # stem, ten blocks, head
    assert fine[11] == ["fc.weight", "fc.bias"]
    assert all(name.startswith("inception_3c.") for name in fine[3])
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 5


def test_grad_checkpointing_gives_the_same_gradients():
    plain = tiny().eval()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(1, 3, 32, 32)
    for model in (plain, saving):
        model(x).sum().backward()
    assert torch.equal(plain.conv1.conv.weight.grad, saving.conv1.conv.weight.grad)


def test_sites():
    model = te.inject(tiny(), "action", n_segment=2)
    found = te.sites(model)
    assert [site.block for site in found] == [
        f"inception_{name}" for name in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    ]
    assert [site.channels for site in found] == [192, 256, 320, 576, 576, 576, 608, 608, 1056, 1024]
    assert [s.block for s in te.sites(te.inject(te.eject(model), "tsm", stages=(5,)))] == [
        "inception_4e",
        "inception_5a",
        "inception_5b",
    ]


def test_loc2_sits_on_the_concatenation():
    model = te.inject(tiny(), "tsm", n_segment=2, placement="loc2").eval()
    assert [s.channels for s in te.sites(model)] == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    plain = te.eject(copy.deepcopy(model)).eval()
    x = torch.randn(2, 192, 4, 4)
    shift = te.TemporalShift(256, 2)
    assert torch.equal(model.inception_3a(x), shift(plain.inception_3a(x)))


@pytest.mark.parametrize("placement", ["loc3", "loc4"])
def test_no_loc3_and_loc4(placement):
    model = tiny()
    with pytest.raises(
        ValueError, match=f"InceptionBlock .inception_3a. has no {placement}; it has loc1, loc2"
    ):
        te.inject(model, placement=placement)
    assert not te.sites(model)


def test_channels_last_and_train_mode():
    model = te.inject(tiny(), "action", n_segment=2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_reset_classifier_without_pool():
    model = tiny().eval()
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1024, 2, 2)
    model.reset_classifier(5, "avg")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_released_batch_norm_momentum():
    norms = [m for m in tiny().modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.9}
    assert {m.momentum for m in BNInception(bn_momentum=0.1).modules() if isinstance(m, nn.BatchNorm2d)} == {
        0.1
    }


def test_new_head_keeps_the_mode():
    model = timm.create_model("bninception").eval()
    model.reset_classifier(5)
    assert not any(module.training for module in model.modules())

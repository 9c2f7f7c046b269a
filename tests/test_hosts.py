"""The host table: which blocks are found, where a module lands, and what it sees there."""

import copy
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from shapes import meta_model, meta_run
from torch import nn

import temporal_excite as te
from temporal_excite.hosts import PLACEMENTS, blocks, find_blocks, known_hosts
from temporal_excite.hosts.blocks import host_of

SITES = json.loads((Path(__file__).parent / "timm_sites.json").read_text())
"""kind -> family -> architecture -> number of sites at loc1: every CNN, VGG and hybrid of timm 1.0.31."""
NAMES = [(kind, n, s) for kind, families in SITES.items() for f in families.values() for n, s in f.items()]

EXCLUDED = {
    # its blocks mix the pixels with a state-space model; none is a convolutional residual block of its own
    **{f"efficientvim_m{i}{end}": "no known block class" for i in range(1, 5) for end in ("", "_dist")},
}
SIZES = {"bat_resnext26ts": 256}
"""Where 96 is too small for the network's own attention."""


class Detach(nn.Module):
    """Stands for a temporal module: lets the values through and no gradient."""

    def __init__(self, channels, n_segment):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        assert x.shape[1] == self.channels
        return x.detach()


class Affine(Detach):
    def forward(self, x):
        return 2 * super().forward(x) + 1


def size_of(kind, name, model):
    """A small input the network takes; hybrids' attention windows need the one they were made for."""
    cfg = model.pretrained_cfg
    fixed = kind == "hybrid" or cfg.get("fixed_input_size")
    return cfg["input_size"][-1] if fixed else SIZES.get(name, 96)


def fired(model):
    """Counter of calls of each temporal module, which also checks that the shape stays."""
    calls = Counter()

    def count(index):
        def hook(module, args, output):
            assert output.shape == args[0].shape
            calls[index] += 1

        return hook

    for index, site in enumerate(te.sites(model)):
        site.module.register_forward_hook(count(index))
    return calls


def test_every_convolutional_architecture_is_listed():
    assert {k: sum(map(len, f.values())) for k, f in SITES.items()} == {
        "conv": 647,
        "plain": 8,
        "hybrid": 209,
    }
    assert {n for _, n, s in NAMES if s == 0} == set(EXCLUDED)
    missing = {n for _, n, _ in NAMES} - set(timm.list_models())
    assert not missing, f"timm {timm.__version__} lacks {missing}"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "expected"), [pytest.param(*n, id=n[1]) for n in NAMES])
def test_sweep(kind, name, expected):
    model = meta_model(name)
    if name in EXCLUDED:
        with pytest.raises(ValueError, match="none of its modules is of a known block class"):
            te.inject(model, "tsm", n_segment=2)
        return
    size = size_of(kind, name, model)
    # feature extractors have no classes to tell their output's shape
    shape = (2, model.num_classes) if model.num_classes else meta_run(model, size).shape
    keys = list(model.state_dict())
    te.inject(model, "shift", n_segment=2)
    sites = te.sites(model)
    assert len(sites) == expected
    assert [key for key in model.state_dict() if ".temporal." not in f".{key}"] == keys
    assert len(model.state_dict()) == len(keys) + expected
    calls = fired(model)
    assert meta_run(model, size).shape == shape
    assert calls == {index: 1 for index in range(expected)}
    taken = {site.block for site in sites}
    skipped = te.sites(model, skipped=True)
    assert taken | {s.block for s in skipped} == {b.name for b in find_blocks(model)}
    te.eject(model)
    assert list(model.state_dict()) == keys


# One small architecture that holds each block class, found by building them
EXAMPLES = json.loads((Path(__file__).parent / "timm_examples.json").read_text())


def test_every_timm_class_has_an_example():
    assert set(EXAMPLES) == {c for c in known_hosts() if c.startswith("timm.")}


# where cutting the gradient at loc1 leaves more than the shortcut
NOT_RESIDUAL = ("dense", "inception", "parallel branches", "cell of two", "no blocks", "the routing weights")


def lively(model):
    """Parameters that make every branch count: timm starts last norms and layer scales at zero."""
    for name, p in model.named_parameters():
        if p.ndim <= 1 or "gamma" in name or "scale" in name or "gain" in name:
            p.data.uniform_(0.5, 1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES))
def test_block(path):
    """Each placement on real tensors: it fires once, the output changes, eject restores it bit by bit; and
    with the gradient cut at loc1, the shortcut's alone remains: the same as when it is cut at loc4."""
    name, size = EXAMPLES[path]
    host = known_hosts()[path]
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=5)).eval()
    x = torch.randn(2, 3, size, size)
    known = [b for b in find_blocks(model) if b.host is host and not b.on_tokens]
    any_shortcut = any(b.has_shortcut for b in find_blocks(model))
    block = next(b for b in known if b.has_shortcut or not any_shortcut)
    inputs, outputs = [], []
    block.module.register_forward_pre_hook(lambda m, args: inputs.append(args))
    block.module.register_forward_hook(lambda m, args, out: outputs.append(out))
    gradients = {}
    for placement in (None, *host.placements):
        if placement:
            te.inject(model, Affine, 2, placement, include=lambda n: n == block.name, every=1)
            calls = fired(model)
        with torch.no_grad():
            model(x)
        if placement:
            assert calls == {0: 1}, placement
            assert not torch.allclose(flat(outputs[-1]), flat(outputs[0])), placement
            te.eject(model)
            if block.has_shortcut and not host.note.startswith(NOT_RESIDUAL):
                te.inject(model, Detach, 2, placement, include=lambda n: n == block.name, every=1)
                gradients[placement] = gradient_of_inputs(block.module, inputs[0])
                te.eject(model)
    with torch.no_grad():
        model(x)
    assert torch.equal(flat(outputs[-1]), flat(outputs[0]))
    if "loc4" in gradients:
        # DLA hands the shortcut to its blocks as an argument of its own, where it is not the input
        shortcut = 1 if ".dla." in path and len(gradients["loc1"]) > 1 else 0
        for placement in ("loc1", "loc4"):
            assert all(g.any() == (i == shortcut) for i, g in enumerate(gradients[placement])), placement
        for at_start, at_end in zip(gradients["loc1"], gradients["loc4"], strict=True):
            torch.testing.assert_close(at_start, at_end)


def gradient_of_inputs(block, args):
    """The gradient of each tensor among a block's arguments, zero where none arrives."""
    given = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    clones = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]  # a block may work in place
    flat(block(*clones)).square().sum().backward()
    given = [a for a in given if isinstance(a, torch.Tensor)]
    return [torch.zeros_like(a) if a.grad is None else a.grad for a in given]


def flat(output):
    """One vector of a block's output, a tensor or a list of them."""
    return torch.cat([o.flatten() for o in output]) if isinstance(output, list | tuple) else output.flatten()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_missing_placement_names_class_and_placements(placement):
    model = meta_model("densenet121")
    if placement == "loc3":
        with pytest.raises(ValueError, match=r"DenseLayer .* has no loc3; it has loc1, loc2, loc4"):
            te.inject(model, "tsm", 2, placement)
        assert not te.sites(model)
    else:
        assert len(te.sites(te.inject(model, "tsm", 2, placement))) == 58


def test_skipped_blocks_are_told():
    model = te.inject(meta_model("mobilenetv2_100"), "tsm", 2)
    skipped = te.sites(model, skipped=True)
    assert len(te.sites(model)) == 10 and len(skipped) == 7
    assert {s.reason for s in skipped} == {"has no shortcut"}
    assert "7 blocks skipped" in str(skipped)
    tokens = te.sites(te.inject(meta_model("caformer_s18"), "tsm", 2), skipped=True)
    assert {s.reason for s in tokens} == {"works on tokens (B, N, C), not on feature maps"}


def test_every_second_block_and_its_override():
    assert len(te.sites(te.inject(meta_model("resnet101"), "tsm", 2))) == 18
    assert len(te.sites(te.inject(meta_model("resnet101"), "tsm", 2, every=1))) == 33


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("resnet101", 18), ("tresnet_m", 21), ("tresnet_xl", 19)])
def test_every_second_block_whatever_flattens_the_names(name, expected, features_only):
    model = meta_model(name, features_only=features_only)
    assert len(te.sites(te.inject(model, "tsm", 2))) == expected


def test_network_without_any_shortcut_takes_every_block():
    model = meta_model("lcnet_050")
    assert not any(block.has_shortcut for block in find_blocks(model))
    assert len(te.sites(te.inject(model, "tsm", 2))) == 13


def test_vgg_before_each_convolution_but_the_first():
    model = te.inject(meta_model("vgg11"), "tsm", 2)
    convs = [n for n, m in model.features.named_children() if isinstance(m, nn.Conv2d)]
    assert [s.layer for s in te.sites(model)] == [f"features.{n}" for n in convs[1:]]


TORCHVISION = {
    "resnet18": (8, "1234"),
    "resnext50_32x4d": (16, "1234"),
    "wide_resnet50_2": (16, "1234"),
    "mobilenet_v2": (10, "1234"),
    "mobilenet_v3_small": (6, "1234"),
    "efficientnet_b0": (9, "1234"),
    "efficientnet_v2_s": (35, "1234"),
    "convnext_tiny": (18, "124"),
    "regnet_y_400mf": (16, "1234"),
    "densenet121": (58, "124"),
    "googlenet": (9, "1"),
    "inception_v3": (11, "1"),
    "mnasnet0_5": (10, "1234"),
    "shufflenet_v2_x0_5": (16, "1234"),
    "vgg11": (7, "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision(name):
    expected, placements = TORCHVISION[name]
    model = torchvision.models.get_model(name, weights=None).eval().to("meta")
    keys = list(model.state_dict())
    for placement in PLACEMENTS:
        if placement[-1] not in placements:
            with pytest.raises(ValueError, match=f"has no {placement}"):
                te.inject(model, "shift", 2, placement)
            continue
        te.inject(model, "shift", 2, placement)
        calls = fired(model)
        assert meta_run(model, 96).shape == (2, 1000)
        assert calls == {index: 1 for index in range(expected)}
        te.eject(model)
        assert list(model.state_dict()) == keys


class MyBlock(nn.Module):
    def __init__(self, channels, skip=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.skip = skip

    def forward(self, x):
        y = self.norm(self.conv(x))
        return x + y if self.skip else y


class MySubclass(MyBlock):
    pass


class Mixed(nn.ModuleDict):
    """A container with a forward of its own, like timm's MixedConv2d: it runs all its children."""

    def __init__(self, channels):
        super().__init__({str(i): nn.Conv2d(channels // 2, channels // 2, 1) for i in range(2)})
        self.in_channels = channels

    def forward(self, x):
        return torch.cat([m(p) for m, p in zip(self.values(), x.chunk(2, 1), strict=True)], 1)


class MixedBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Mixed(channels)

    def forward(self, x):
        return x + self.conv(x)


@pytest.fixture
def my_hosts(monkeypatch):
    monkeypatch.setattr(blocks, "_HOSTS", known_hosts())
    te.register_host(MyBlock, loc1="pre:conv", loc2="out:conv", loc4="out:norm", shortcut="skip")
    te.register_host(MixedBlock, loc1="pre:conv")
    te.register_host(Mixed, loc1="pre:")


def test_register_host(my_hosts):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), MyBlock(8), MyBlock(8, skip=False), MySubclass(8)).eval()
    x = torch.randn(4, 3, 5, 5)
    plain = model(x)
    te.inject(model, "tsm", 2)
    assert [s.layer for s in te.sites(model)] == ["1.conv", "3.conv"]
    assert [(s.block, s.reason) for s in te.sites(model, skipped=True)] == [("2", "has no shortcut")]
    assert not torch.equal(model(x), plain)
    with pytest.raises(ValueError, match=r"MyBlock .1. has no loc3; it has loc1, loc2, loc4"):
        te.inject(te.eject(model), "tsm", 2, "loc3")


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"loc1": "pre:#5"}, "has no layer '#5'"),
        ({"loc1": "pre:#x"}, "has no layer '#x'"),
        ({"loc1": "pre:training"}, "has no layer 'training'"),
        ({"loc1": "pre:conv", "shortcut": "nosuch"}, "has no attribute 'nosuch'"),
    ],
)
def test_hosts_that_do_not_fit_their_class(my_hosts, host, message):
    te.register_host(MyBlock, **host)
    with pytest.raises(ValueError, match=message):
        te.inject(nn.Sequential(MyBlock(8)), "tsm", 2)


@pytest.mark.parametrize("attribute", ["shortcut", "tokens"])
def test_register_host_rejects_what_is_no_name(attribute):
    with pytest.raises(TypeError, match=f"{attribute} must be the name of an attribute, got 3"):
        te.register_host(MyBlock, loc1="pre:conv", **{attribute: 3})


@pytest.mark.parametrize("anchor", ["conv1", "before:conv1", "pre:conv@garbage", 3])
def test_register_host_rejects_bad_anchors(anchor):
    with pytest.raises(ValueError, match='must read "pre:child" or "out:child"'):
        te.register_host(MyBlock, loc1=anchor)
    assert host_of(MyBlock(4)) is None


def test_register_host_rejects_no_points_and_no_class():
    with pytest.raises(ValueError, match="at least one of loc1"):
        te.register_host(MyBlock)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module class"):
        te.register_host(MyBlock(4), loc1="pre:conv")
    with pytest.raises(TypeError, match="its dotted name, got 'MyBlock'"):
        te.register_host("MyBlock", loc1="pre:conv")


def test_container_never_holds_the_child(my_hosts):
    model = nn.Sequential(MixedBlock(8))
    te.inject(model, "shift", 2)
    assert list(model[0].conv) == ["0", "1"] and "0.temporal.weight" in model.state_dict()
    x = torch.randn(4, 8, 3, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin[0].temporal.weight.zero_()
        assert not torch.equal(twin(x), model(x))
    te.eject(model)
    assert vars(model[0].conv).keys() == vars(Mixed(8)).keys() and not hasattr(model[0], "temporal")
    with pytest.raises(ValueError, match="is a container that runs all its children"):
        te.inject(nn.Sequential(Mixed(8)), "shift", 2)


def test_layer_with_an_attribute_temporal_is_refused(my_hosts):
    model = nn.Sequential(MyBlock(8), MyBlock(8))
    model[1].conv.temporal = 1
    with pytest.raises(ValueError, match="has an attribute 'temporal' of its own"):
        te.inject(model, "tsm", 2)
    assert not te.sites(model)


def test_nested_models_and_include(my_hosts):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb = timm.create_model("resnet18", num_classes=0)
            self.flow = nn.ModuleDict({"net": timm.create_model("resnet10t", num_classes=0)})

        def forward(self, x):
            return self.rgb(x) + self.flow["net"](x)

    model = te.inject(Two(), "tsm", 2)
    assert Counter(s.layer.split(".")[0] for s in te.sites(model)) == {"rgb": 8, "flow": 4}
    te.inject(te.eject(model), "tsm", 2, include=r"^flow\.")
    assert {s.layer.split(".")[0] for s in te.sites(model)} == {"flow"}
    assert {s.stage for s in te.sites(model)} == {2, 3, 4, 5}
    model(torch.randn(2, 3, 32, 32))


def test_same_block_twice(my_hosts):
    block = MyBlock(8)
    model = te.inject(nn.Sequential(block, nn.ReLU(), block), "shift", 2)
    assert len(te.sites(model)) == 1
    calls = fired(model)
    model(torch.randn(4, 8, 3, 3))
    assert calls == {0: 2}
    te.eject(model)
    assert not te.sites(model) and not block.conv._forward_pre_hooks


def test_channels_last_block_sees_channels_first():
    model = te.inject(timm.create_model("test_mambaout"), Detach, 2)
    model(torch.randn(2, 3, 64, 64))  # Detach asserts the channels
    assert te.sites(model)

"""TE, FE and TEFE's networks against their plain references."""

import copy
from unittest.mock import patch

import pytest
import reference_tea as plain
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speed import saved_bytes
from test_fast import frames as in_layout
from test_modules import gradients, randomise
from test_tea import frames, network
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import temporal_excite as te
from temporal_excite import passes

T = 4
TABLE_5 = [  # te, fe per stage
    ((3, 4, 6, 3), (0, 0, 0, 0)),
    ((0, 0, 0, 0), (0, 4, 6, 3)),
    ((3, 3, 3, 3), (0, 1, 3, 0)),
    ((2, 2, 2, 2), (0, 2, 4, 1)),
    ((1, 1, 1, 1), (0, 3, 5, 2)),
]
BUILD = {
    "te": lambda c, t: te.TEModule(c, t),
    "te relu": lambda c, t: te.TEModule(c, t, 2, relu=True),
    "fe": lambda c, t: te.FEModule(c, t),
    "fe stride, bias": lambda c, t: te.FEModule(c, t, c + 1, stride=2, bias=True),
    "fe dilation, groups": lambda c, t: te.FEModule(2 * c, t, dilation=2, groups=2),
    "fe 1x1": lambda c, t: te.FEModule(c, t, kernel_size=1),
}
shapes = st.tuples(*(st.integers(1, top) for top in (2, 5, 7, 5, 5)))  # N, T, C, H, W


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_equals_reference(name, shape, seed):
    n, t, c, h, w = shape
    torch.manual_seed(seed)
    module = randomise(BUILD[name](c, t).double())
    x = torch.randn(n * t, module.channels, h, w, dtype=torch.float64, requires_grad=True)
    expected = plain.temporal_extraction if isinstance(module, te.TEModule) else plain.feature_enhancement
    y, want = module(x), expected(x, module)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    inputs = [x, *module.parameters()]
    for a, b in zip(gradients(y, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + float(b.abs().max())))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    layout=st.sampled_from(["contiguous", "sliced", "channels_last"]),
    large=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_te_in_one_pass_equals_reference(shape, layout, large, causal, seed):
    """float32 takes ways of its own, large results another than small ones."""
    n, t, c, h, w = shape
    torch.manual_seed(seed)
    module = randomise(te.TEModule(c, t, causal=causal))
    twin = copy.deepcopy(module).double()
    x = in_layout((n * t, c, h, w), layout, torch.float32)
    x64 = x.double().requires_grad_()
    want = (plain.causal_extraction if causal else plain.temporal_extraction)(x64, twin)
    grads = gradients(want, [x64, *twin.parameters()])
    with patch.object(passes, "_FRESH", 0 if large else passes._FRESH):
        with torch.no_grad():
            y = module(x)
        torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-5)
        assert not y._is_view()
        y = module(x.requires_grad_())
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(y.double(), [x, *module.parameters()]), grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_te_in_one_pass_where_it_may(fast, causal):
    """One pass, with gradients and without, unless published steps are asked for."""
    module = te.set_fast(te.TEModule(8, T, causal=causal), fast)
    x = torch.rand(T, 8, 6, 6)
    for gradients_wanted in (True, False):
        with (
            patch.object(passes, "temporal_conv", wraps=passes.temporal_conv) as conv,
            torch.inference_mode(not gradients_wanted),
        ):
            module(x)
        assert conv.called == fast


@pytest.mark.parametrize("causal", [False, True])
def test_te_keeps_its_input_alone(causal):
    """Beside it only what has no height and width; with the published steps full-size products too."""
    module = te.TEModule(8, T, causal=causal)
    x = torch.rand(T, 8, 30, 30, requires_grad=True)
    assert x.nbytes <= saved_bytes(module, x) < 2 * x.nbytes
    assert saved_bytes(te.set_fast(module, False), x) >= 2 * x.nbytes


@pytest.mark.parametrize("name", BUILD)
def test_gradcheck(name):
    torch.manual_seed(0)
    module = randomise(BUILD[name](3, 2).double())
    x = torch.randn(4, module.channels, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    if name == "te":
        assert torch.autograd.gradgradcheck(module, (x,))


def test_te_kernel_and_gate():
    """With a closed gate nothing passes; with the softmax at one tap the module is that shift."""
    module = randomise(te.TEModule(4, 3))
    x = torch.rand(6, 4, 2, 2) + 1
    with torch.no_grad():
        for w in (module.reduce.weight, module.expand.weight):
            w.zero_()
        module.fc1.weight.fill_(1)
        module.fc2.weight.zero_()
        module.fc2.weight[2] = 100  # softmax puts all on the tap of t + 1
    ahead = nn.functional.pad(x.unflatten(0, (2, 3))[:, 1:], (0, 0) * 3 + (0, 1)).flatten(0, 1)
    torch.testing.assert_close(module(x), ahead / 2)  # the gate is sigmoid(0)


# --- FE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 8, (1, 3), stride=(1, 2), padding=(0, 1), groups=4),
    ],
)
def test_fe_around_a_convolution(conv):
    """It starts as the convolution, bit for bit, and computes Eq. 10 with the convolution's weight."""
    torch.manual_seed(0)
    conv = copy.deepcopy(conv).double()
    module = te.FEModule.around(conv, 3).double()
    x = torch.randn(6, 4, 7, 6, dtype=torch.float64)
    assert torch.equal(module(x, conv(x)), conv(x))
    randomise(module)
    want = plain.feature_enhancement(x, module, host=conv)
    torch.testing.assert_close(module(x, conv(x)), want, rtol=1e-11, atol=1e-11)
    assert all(p.ndim <= 4 for p in module.parameters())


def test_fe_of_its_own_starts_as_its_centre():
    module = te.FEModule(4, 3, bias=True)
    x = torch.randn(6, 4, 5, 5)
    assert torch.equal(module(x), module.conv1.center(x))
    module.to(memory_format=torch.channels_last)  # raises where a parameter is 5-D


def test_fresh_fe_network_is_the_host():
    """fe everywhere: the output stays, to the bit."""
    model, x = network(Bottleneck, (2, 2, 2, 1)), frames(2)
    before, keys = model(x), list(model.state_dict())
    te.inject(model, "tefe", T, te=(0, 0, 0, 0), fe=(1, 2, 2, 1))
    assert torch.equal(model(x), before)
    assert [k for k in model.state_dict() if ".temporal." not in k] == keys
    for site in te.sites(model):
        randomise(site.module)
    assert not torch.allclose(model(x), before, rtol=1e-2)
    te.eject(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "seresnet50", "resnet50d", "resnetaa50"])
def test_fe_on_relatives_of_resnet(name):
    """Groups, squeeze-and-excitation behind, another stem, anti-aliased strides, dilated stages."""
    torch.manual_seed(0)
    kwargs = {} if "aa" in name or "50d" in name else {"output_stride": 16}
    model = timm.create_model(name, pretrained=False, num_classes=3, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    x = torch.randn(T, 3, 32, 32)
    before = model(x)
    te.inject(model, "tefe", T, te=(0,) * 4, fe=(0, 0, 1, 1))
    assert torch.equal(model(x), before)


# --- networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", TABLE_5, ids=str)
def test_arrangements_of_table_5(counts):
    te_blocks, fe_blocks = counts
    with torch.device("meta"):
        model = te.inject(timm.create_model("resnet50"), "tefe", 16, te=te_blocks, fe=fe_blocks)
    found = te.sites(model)
    for stage in range(2, 6):
        kinds = [s.placement for s in found if s.stage == stage]
        assert kinds == ["te"] * te_blocks[stage - 2] + ["fe"] * fe_blocks[stage - 2]
    assert {s.layer.rpartition(".")[2] for s in found if s.placement == "te"} <= {"conv3"}
    assert {s.layer.rpartition(".")[2] for s in found if s.placement == "fe"} <= {"conv2"}
    assert model(torch.empty(16, 3, 32, 32, device="meta")).shape == (16, 1000)


def test_parameters_of_the_final_network():
    with torch.device("meta"):
        model = te.inject(timm.create_model("resnet50", num_classes=174), "tefe")
    assert sum(p.numel() for p in model.parameters()) == 64_940_590
    assert [(s.block, s.placement) for s in te.sites(model)][:5] == [
        ("layer1.0", "te"),
        ("layer2.0", "te"),
        ("layer2.1", "fe"),
        ("layer2.2", "fe"),
        ("layer2.3", "fe"),
    ]


@pytest.mark.parametrize("kwargs", [{}, {"te": (0,) * 4}, {"fe": (0,) * 4}, {"relu": True}], ids=str)
def test_inject_and_eject(kwargs):
    model, x = network(Bottleneck, (2, 4, 6, 3)), frames()
    weights, before = copy.deepcopy(model.state_dict()), model(x)
    te.inject(model, "tefe", T, **kwargs)
    host = {k: v for k, v in model.state_dict().items() if ".temporal." not in k}
    assert all(torch.equal(v, host[k]) for k, v in weights.items()) and len(host) == len(weights)
    model.train()(frames(2)).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    assert [k for k, g in grads.items() if g is None or (".temporal." in k and not g.abs().max() > 0)] == []
    te.eject(model)
    model.load_state_dict(weights)
    assert torch.equal(model.eval()(x), before)


def test_stages():
    with torch.device("meta"):
        found = te.sites(te.inject(timm.create_model("resnet50"), "tefe", stages=(3, 5)))
    assert [(s.stage, s.placement) for s in found] == [
        (3, "te"),
        *[(3, "fe")] * 3,
        (5, "te"),
        *[(5, "fe")] * 2,
    ]


def test_n_segment_is_fixed_by_te():
    """The linear layers fit one T: an error that says so, before anything is changed."""
    model, x = te.inject(network(Bottleneck, (2, 4, 6, 3)), "tefe", T), frames()
    before = model(x)
    with pytest.raises(ValueError, match=r"cannot work on clips of 8 frames.*4-vector.*n_segment=8\)"):
        te.set_n_segment(model, 8)
    assert {s.module.n_segment for s in te.sites(model)} == {T} and torch.equal(model(x), before)
    te.set_n_segment(model, T)
    te.eject(model)
    te.inject(model, "tefe", T, te=(0,) * 4)
    te.set_n_segment(model, 2)  # FE alone has no such layer
    assert {s.module.n_segment for s in te.sites(model)} == {2}
    module = te.TEModule(4, 4)
    module.n_segment = 2
    with pytest.raises(ValueError, match="cannot work on clips of 2 frames"):
        module(torch.zeros(4, 4, 2, 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: te.TEModule(4, 0), "n_segment must be at least 1, got 0"),
        (lambda: te.TEModule(4, reduction=0), "reduction must be at least 1"),
        (lambda: te.FEModule(4, kernel_size=2), "kernel_size must be odd, got 2"),
        (lambda: te.FEModule(4, stride=0), "stride must be at least 1"),
        (lambda: te.FEModule(4, out_channels=0), "out_channels must be at least 1"),
        (lambda: te.FEModule(4, 4)(torch.zeros(6, 4, 2, 2)), "6 frames are not a multiple"),
        (lambda: te.TEModule(4, 4)(torch.zeros(8, 5, 2, 2)), "4 channels got input"),
        (lambda: te.TEModule(4, 4)(torch.zeros(2, 4, 4, 2, 2)), "5-D"),
        (lambda: te.inject(network(Bottleneck), "tefe", te=(1, 1, 1)), "te must be four whole numbers"),
        (lambda: te.inject(network(Bottleneck), "tefe", fe=(0, -1, 0, 0)), "fe must be four whole numbers"),
        (lambda: te.inject(network(Bottleneck), "tefe"), "stage 3 has 2 blocks to choose from, too few"),
        (lambda: te.inject(network(Bottleneck), "tefe", te=(0,) * 4, fe=(0,) * 4), "put no module into"),
        (
            lambda: te.inject(network(BasicBlock), "tefe", fe=(1,) * 4),
            "BasicBlock .layer1.1. is no",
        ),
        (lambda: te.inject(network(Bottleneck), "tefe", placement="loc1"), "chooses its own points"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fe_says_what_it_lacks():
    x = torch.zeros(8, 4, 3, 3)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(TypeError, match="needs its output"):
        te.FEModule.around(conv, 8)(x)
    with pytest.raises(TypeError, match="of its own"):
        te.FEModule(4, 8)(x, conv(x))

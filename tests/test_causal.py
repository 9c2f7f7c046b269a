"""The causal forms: against their plain references, and blind to the future; on whole clips."""

import copy

import pytest
import reference_tea
import test_modules
import test_tea
import timm
import torch
from families import settle
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_modules import gradients, randomise
from torch import nn

import temporal_excite as te
from temporal_excite.modules import MotionExcitation
from temporal_excite.modules.tea import PartConv

BUILD = {
    "tsm": lambda c, t, **k: te.TemporalShift(c, t, shift_div=4, **k),
    "shift": te.TemporalConv,
    "conv full": lambda c, t, **k: te.TemporalConv(c, t, init="random", depthwise=False, **k),
    "ste": te.STE,
    "ce": te.CE,
    "me": te.ME,
    "me without norm": lambda c, t, **k: te.ME(c, t, norm=False, **k),
    "action": te.ActionModule,
    "action without shift": lambda c, t, **k: te.ActionModule(c, t, shift=False, relu=False, **k),
    "action identity start": lambda c, t, **k: te.ActionModule(c, t, identity_start=True, **k),
    "ce+me": lambda c, t, **k: te.ActionModule(c, t, 4, paths=("ce", "me"), **k),
    "tea me": MotionExcitation,
    "tea me text": lambda c, t, **k: MotionExcitation(c, t, 4, form="text", residual=False, **k),
    "mta": lambda c, t, **k: te.MTA(4 * c, t, **k),
    "mta text": lambda c, t, **k: te.MTA(3 * c, t, 3, form="text", **k),
    "mta stride": lambda c, t, **k: te.MTA(4 * c, t, stride=2, **k),
    "block": lambda c, t, **k: te.TEABlock(c, 32, t, base_width=32, **k),
    "part": lambda c, t, **k: PartConv(c, t, width=(c + 1) // 2, **k),
    "te": te.TEModule,
    "te relu": lambda c, t, **k: te.TEModule(c, t, 2, relu=True, **k),
    "fe": te.FEModule,
    "fe stride, groups": lambda c, t, **k: te.FEModule(2 * c, t, stride=2, groups=2, bias=True, **k),
}
STATISTICS = [n for n in BUILD if n.startswith(("me", "action", "ce+me", "tea me", "mta", "block"))]
"""Those with batch norms: in training another computation."""
shapes = st.tuples(*(st.integers(1, top) for top in (2, 5, 12, 5, 5)))  # N, T, C, H, W


def build(name, channels, n_segment, training=False, **kwargs):
    module = BUILD[name](channels, n_segment, causal=True, **kwargs)
    return randomise(module.double()).train(training)


def expected(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, te.TEModule):
        return reference_tea.causal_extraction(x, module)
    if isinstance(module, te.FEModule):
        return reference_tea.feature_enhancement(x, module)
    if isinstance(module, PartConv):
        rest = x[:, : module.channels - module.conv.channels]
        return torch.cat([rest, expected(module.conv, x[:, rest.shape[1] :])], 1)
    if isinstance(module, MotionExcitation | te.MTA | te.TEABlock) or not getattr(module, "depthwise", True):
        return test_tea.expected(module, x)
    return test_modules.plain(module, x)


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=12, deadline=None)
@given(shape=shapes, training=st.booleans(), fast=st.booleans(), seed=st.integers(0, 99))
def test_equals_reference(name, shape, training, fast, seed):
    n, t, c, h, w = shape
    training = training and name in STATISTICS
    # batch norm needs more than a few values, and no motion is rounding alone
    assume(not training or (n * t * h * w > 8 and n * t > 2 and t > 1))
    torch.manual_seed(seed)
    module = te.set_fast(build(name, c, t, training), fast)
    twin = copy.deepcopy(module)
    x = torch.randn(n * t, module.channels, h, w, dtype=torch.float64, requires_grad=True)
    y, want = module(x), expected(twin, x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    inputs, twins = [x, *module.parameters()], [x, *twin.parameters()]
    for a, b in zip(gradients(y, inputs), gradients(want, twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "published"])
def test_the_future_does_not_matter(name, fast):
    """Neither by gradient nor by value; the present and the past do."""
    torch.manual_seed(0)
    t = 5
    module = te.set_fast(build(name, 8, t), fast)
    x = torch.randn(2 * t, module.channels, 4, 3, dtype=torch.float64, requires_grad=True)
    y = module(x)
    past_seen = False
    for frame in range(t):
        (grad,) = torch.autograd.grad(y[t + frame].square().sum(), x, retain_graph=True)
        seen = grad.abs().amax((1, 2, 3)) > 0
        assert not seen[:t].any() and not seen[t + frame + 1 :].any()
        assert seen[t + frame] or frame == 0  # no motion yet: "without residual" gives zero
        past_seen |= bool(seen[t : t + frame].any())
        other = x.detach().clone()
        other[t + frame + 1 :] = torch.randn_like(other[t + frame + 1 :]) * 10
        assert torch.equal(module(other.requires_grad_())[: t + frame + 1], y[: t + frame + 1])
    assert past_seen


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_clips(name, causal, memory_format):
    module = BUILD[name](4, 3, causal=causal)
    shape = module(torch.randn(3, module.channels, 5, 4)).shape
    x = torch.randn(0, module.channels, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
    for training in (True, False):
        y = module.train(training)(x)
        assert y.shape == (0, *shape[1:])
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in [x, *module.parameters()])
    with torch.no_grad():
        assert module(x).shape == y.shape


@pytest.mark.parametrize("name", ["tsm", "ste", "ce", "me", "action", "mta text", "te", "fe", "tea me text"])
def test_gradcheck(name):
    torch.manual_seed(0)
    module = build(name, 4, 3)
    x = torch.randn(3, module.channels, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("name", ["shift", "te"])
def test_second_derivatives(name):
    torch.manual_seed(0)
    module = build(name, 3, 4)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize("name", BUILD)
def test_weights_are_those_of_the_two_sided_module(name):
    torch.manual_seed(0)
    causal, both = BUILD[name](16, 4, causal=True), BUILD[name](16, 4)
    assert {k: v.shape for k, v in causal.state_dict().items()} == {
        k: v.shape for k, v in both.state_dict().items()
    }
    causal.load_state_dict(both.state_dict())
    assert "causal=True" in repr(causal) and "causal" not in repr(both)
    x = torch.randn(8, causal.channels, 4, 4)
    assert not torch.allclose(randomise(causal)(x), randomise(both)(x), rtol=1e-2)


def test_starts():
    x = torch.randn(10, 19, 3, 2)
    shifted = te.TemporalShift(19, 5, causal=True)(x)
    assert torch.equal(shifted[:, 2:], x[:, 2:])
    assert torch.equal(shifted[1:5, :2], x[:4, :2]) and not shifted[::5, :2].any()
    for depthwise in (True, False):
        assert torch.equal(te.TemporalConv(19, 5, depthwise=depthwise, causal=True)(x), shifted)
        identity = te.TemporalConv(19, 5, init="identity", depthwise=depthwise, causal=True)
        assert torch.equal(identity(x), x)
    for cls in (te.STE, te.CE, te.ME, te.ActionModule):
        assert torch.equal(cls(19, 5, identity_start=True, causal=True).eval()(x), x)
    assert torch.equal(te.TemporalShift(7, 5, causal=True)(x[:, :7]), x[:, :7])  # 7 // 8 channels move
    conv = nn.Conv2d(19, 4, 3, padding=1)
    assert torch.equal(te.FEModule.around(conv, 5, causal=True)(x, conv(x)), conv(x))
    last = te.MTA(16, 5, causal=True).shifts[-1].weight[:, 0]
    assert last.tolist() == [[0, 1, 0]] * 2 + [[0, 0, 1]] * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["tsm", "shift", "action", "ce+me", "mta"])
def test_layouts_and_blocks(name, layout):
    """Large maps are cut into blocks; fast and published agree in every layout."""
    torch.manual_seed(0)
    module = build(name, 40, 4)
    x = torch.randn(8, module.channels, 32, 31, dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.stack([x, x], dim=-1)[..., 0]
    with torch.no_grad():
        fast = module(x)
        published = te.set_fast(module, False)(x.contiguous())
    torch.testing.assert_close(fast, published, rtol=1e-11, atol=1e-11)


def test_causal_te_takes_clips_of_any_length():
    """Its linear layers see the last T frames, wherever a clip ends."""
    torch.manual_seed(0)
    module = build("te", 6, 3)
    x = torch.randn(7, 6, 2, 2, dtype=torch.float64)
    model = nn.Sequential(module)
    module.check_n_segment(7)
    module.n_segment = 7
    torch.testing.assert_close(model(x), reference_tea.causal_extraction(x, module), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUILD)
def test_countable_form(name):
    """What a counter of FLOPs sees gives the same; the convolutions cost as the two-sided ones."""
    from temporal_excite import ops

    torch.manual_seed(0)
    module = te.set_fast(build(name, 8, 4), False)
    x = torch.randn(8, module.channels, 4, 3, dtype=torch.float64)
    y = module(x)
    with ops.countable():
        torch.testing.assert_close(module(x), y, rtol=1e-11, atol=1e-11)
    if not name.startswith(("shift", "conv", "ste", "ce", "mta", "part", "fe")) or name == "ce+me":
        return  # ME pools twice, TE has a kernel for every frame
    flops = {
        causal: te.count(nn.Sequential(BUILD[name](8, 4, causal=causal)), (4, module.channels, 4, 3)).flops
        for causal in (False, True)
    }
    assert flops[True] == flops[False]


# --- in networks -------------------------------------------------------------------------------------

NETWORKS = {  # name -> (host, keywords)
    "action": ("resnet10t", {}),
    "shift": ("resnet10t", {}),
    "tsm": ("resnet10t", {}),
    "ste": ("resnet10t", {}),
    "ce": ("resnet10t", {}),
    "me": ("resnet10t", {}),
    "tea_me": ("resnet10t", {}),
    "te": ("resnet10t", {}),
    "tea": ("res2net50_48w_2s", {}),
    "mta": ("res2net50_48w_2s", {}),
    "2plus1d": ("resnet10t", {"conv": "conv"}),
    "2plus1d_me": ("resnet10t", {}),
    "2plus1d_se": ("resnet10t", {}),
    "tefe": ("resnet26", {"te": (1, 0, 0, 1), "fe": (0, 1, 1, 0)}),
}


def test_every_registered_name_is_listed():
    own = {n for n in (*te.module_names(), *te.network_names())}
    assert set(NETWORKS) == own


@torch.no_grad()
def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A causal network in float64, with nothing that hides a module, and a clip for it."""
    host, kwargs = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(host, num_classes=3).eval().double()
    for key, p in model.named_parameters():
        if p.ndim == 1 and not key.endswith("bias"):
            p.uniform_(0.5, 1)
    te.inject(model, name, 3, causal=True, **kwargs)
    for site in te.sites(model):
        randomise(site.module)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    settle(model, x)
    return model, x


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_do_not_look_ahead(name):
    model, x = network(name)
    y = model(x)
    for changed in range(3):
        other = x.clone()
        other[changed] = torch.randn_like(x[0])
        change = (model(other) - y).abs().amax(1) / y.abs().max()
        assert (change[:changed] < 1e-13).all() and (change[changed:] > 1e-4).all()


@pytest.mark.parametrize("name", ["action", "shift"])
@torch.no_grad()
def test_identity_start(name):
    torch.manual_seed(0)
    model, x = timm.create_model("resnet10t", num_classes=3).eval(), torch.randn(4, 3, 32, 32)
    before = model(x)
    assert torch.equal(te.inject(model, name, 4, identity_start=True, causal=True)(x), before)


def test_modules_without_a_causal_form():
    class Both(nn.Module):
        def __init__(self, channels, n_segment):
            super().__init__()
            self.n_segment = n_segment

    class Deaf(Both):
        def __init__(self, channels, n_segment, **kwargs):
            super().__init__(channels, n_segment)

    model = timm.create_model("resnet10t")
    te.register_module("two-sided", Both)
    te.register_network("two-sided net", lambda blocks, n_segment: [])
    try:
        for module, message in [
            (Both, "Both.* has no causal form: it takes no keyword causal"),
            ("two-sided", "'two-sided' has no causal form"),
            ("two-sided net", "'two-sided net' has no causal form"),
            (Deaf, "Deaf takes causal=True, but .* derive it from temporal_excite.modules.TemporalModule"),
        ]:
            with pytest.raises(TypeError, match=message):
                te.inject(model, module, 4, causal=True)
            assert not te.sites(model)
        assert te.sites(te.inject(model, "two-sided", 4))
    finally:
        from temporal_excite.modules import registry

        del registry._MODULES["two-sided"], registry._NETWORKS["two-sided net"]

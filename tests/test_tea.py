"""ME, MTA, the TEA block, the temporal convolutions, and TEA's networks, against their plain references."""

import copy

import pytest
import reference
import reference_tea as plain
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_modules import gradients, randomise
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import temporal_excite as te
from temporal_excite.modules import MotionExcitation
from temporal_excite.networks import TEMPORAL_CONVS

T = 4


class BetweenReLUs(nn.Module):
    """ME where a Res2Net block has it."""

    def __init__(self, channels, n_segment, **kwargs):
        super().__init__()
        self.channels = channels
        self.me = MotionExcitation(channels, n_segment, **kwargs)
        self.me.between_relus = True
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.me(x.relu()))


BUILD = {
    "me": lambda c, t: MotionExcitation(c, t),
    "me text": lambda c, t: MotionExcitation(c, t, 4, form="text"),
    "me between relus": lambda c, t: BetweenReLUs(c, t, reduction=2),
    "me text between relus": lambda c, t: BetweenReLUs(c, t, form="text"),
    "me without residual": lambda c, t: MotionExcitation(c, t, residual=False),
    "mta": lambda c, t: te.MTA(4 * c, t),
    "mta text": lambda c, t: te.MTA(4 * c, t, form="text"),
    "mta scale 2": lambda c, t: te.MTA(2 * c, t, 2),
    "mta scale 3, text": lambda c, t: te.MTA(3 * c, t, 3, form="text"),
    "mta stage": lambda c, t: te.MTA(4 * c, t, stage=True),
    "mta stride": lambda c, t: te.MTA(4 * c, t, stride=2),
    "mta stride, text": lambda c, t: te.MTA(4 * c, t, stride=2, form="text"),
    "mta groups, dilation": lambda c, t: te.MTA(8 * c, t, groups=2, dilation=2),
    "conv full": lambda c, t: te.TemporalConv(c, t, init="random", depthwise=False),
    "block": lambda c, t: te.TEABlock(16, 16, t, base_width=32),
    "block, stride": lambda c, t: te.TEABlock(3, 16, t, stride=2, base_width=64, scale=3),
    "block text": lambda c, t: te.TEABlock(4 * c, 32, t, form="text"),
}
shapes = st.tuples(*(st.integers(1, top) for top in (2, 4, 5, 5, 5)))  # N, T, C, H, W


def expected(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, MotionExcitation):
        return plain.motion_excitation(x, module)
    if isinstance(module, BetweenReLUs):
        return plain.motion_excitation(x.relu(), module.me).relu()
    if isinstance(module, te.MTA):
        return plain.mta(x, module)
    if isinstance(module, te.TEABlock):
        return plain.tea_block(x, module)
    return plain.full_temporal_conv(x, module.weight, module.n_segment, reference.first_tap(module))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=10, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_equals_reference(name, training, shape, seed):
    n, t, c, h, w = shape
    # batch norm needs more than one value, and two differ by rounding alone where their variance vanishes;
    # T = 1 has no motion, which a batch norm in training makes nothing but rounding of
    assume(not training or (n * t > 2 and t > 1))
    torch.manual_seed(seed)
    module = randomise(BUILD[name](c, t).double()).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(n * t, module.channels, h, w, dtype=torch.float64, requires_grad=True)

    y, want = module(x), expected(twin, x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    inputs, twins = [x, *module.parameters()], [x, *twin.parameters()]
    for a, b in zip(gradients(y, inputs), gradients(want, twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * (1 + float(b.abs().max())))


@pytest.mark.parametrize(
    "name", ["me", "me text", "me between relus", "mta text", "mta stride, text", "conv full"]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradcheck(name, training):
    torch.manual_seed(0)
    module = randomise(BUILD[name](2, 2).double()).train(training)
    x = torch.randn(4, module.channels, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    if name.startswith("me"):  # whose gate has a backward of its own
        assert torch.autograd.gradgradcheck(module, (x,))


def test_between_relus_a_result_is_final():
    """The ReLU behind ME does nothing, and what is changed all the same before backward is an error."""
    torch.manual_seed(0)
    module = MotionExcitation(16, T)
    module.between_relus = True
    x = torch.rand(T, 16, 3, 2, requires_grad=True)
    excited = module(x)
    version = excited._version
    result = nn.ReLU(inplace=True)(excited)
    assert type(result) is torch.Tensor
    assert result.data_ptr() == excited.data_ptr() and result._version == version
    gradient, again = (torch.autograd.grad(result.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(gradient, again)
    torch.testing.assert_close(gradient, torch.autograd.grad(module(x).as_subclass(torch.Tensor).sum(), x)[0])
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("layer", ["bn1", "bn1.temporal"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_result_that_hooks_change_is_rectified(layer, mode):
    outputs = []
    for fast in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("res2net50_26w_4s", num_classes=5, zero_init_last=False)
        te.inject(model, "tea", n_segment=4).eval()
        if layer == "bn1" or mode is torch.no_grad:
            model.layer1[1].get_submodule(layer).register_forward_hook(lambda layer, args, y: y.sub_(1))
        with mode():
            outputs.append(te.set_fast(model, fast)(torch.randn(4, 3, 32, 32)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4 * outputs[1].abs().max().item())


def test_gates_stay_positive():
    """The factor of ME is within (1/2, 3/2), of Eq. 4 within (0, 2): a ReLU behind ME changes nothing."""
    torch.manual_seed(0)
    x = 100 * torch.randn(6, 32, 4, 4)
    for form, bound in (("released", 0.5), ("text", 1)):
        gate = randomise(MotionExcitation(32, 3, form=form)).eval().gate(x)
        assert gate.shape == (6, 32, 1, 1) and gate.abs().max() <= bound and gate.abs().max() > 0.9 * bound


# --- appendix A: one family of temporal convolutions -------------------------------------------------


@pytest.mark.parametrize("channels, n_segment, shift_div", [(16, 4, 8), (13, 3, 4), (5, 1, 2), (1, 2, 8)])
@pytest.mark.parametrize("depthwise", [True, False])
def test_shift_start_is_tsm(channels, n_segment, shift_div, depthwise):
    """Eq. 10 equals Eq. 9."""
    x = torch.randn(2 * n_segment, channels, 3, 2)
    conv = te.TemporalConv(channels, n_segment, shift_div, depthwise=depthwise)
    assert torch.equal(conv(x), te.TemporalShift(channels, n_segment, shift_div)(x))


@pytest.mark.parametrize("depthwise", [True, False])
def test_identity_start(depthwise):
    x = torch.randn(6, 5, 3, 2)
    assert torch.equal(te.TemporalConv(5, 3, init="identity", depthwise=depthwise)(x), x)


def test_temporal_convs_of_table_5():
    """Shift and CW have 3 C weights, Conv 3 C C, TSM none; a full convolution holds the depthwise ones."""
    counts = {k: sum(p.numel() for p in f(16, T).parameters()) for k, f in TEMPORAL_CONVS.items()}
    assert counts == {"shift": 48, "cw": 48, "conv": 768, "tsm": 0}
    torch.manual_seed(0)
    depthwise, full = (f(6, 3) for f in (TEMPORAL_CONVS["cw"], TEMPORAL_CONVS["conv"]))
    with torch.no_grad():
        full.weight.copy_(torch.diag_embed(depthwise.weight[:, 0].T).permute(1, 2, 0))
    x = torch.randn(6, 6, 4, 5)
    torch.testing.assert_close(full(x), depthwise(x))
    assert not torch.equal(TEMPORAL_CONVS["cw"](6, 3).weight, depthwise.weight)  # random


# --- networks ----------------------------------------------------------------------------------------


def network(block: type[nn.Module], layers: tuple[int, ...] = (2, 2, 1, 1), **kwargs) -> ResNet:
    """A small network whose last norms are not at zero, which would hide every site."""
    torch.manual_seed(0)
    if block is Bottle2neck:
        kwargs = {"base_width": 26, "block_args": {"scale": 4}, **kwargs}
    return randomise_norms(ResNet(block, layers, num_classes=5, **kwargs)).eval()


def randomise_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def frames(clips: int = 1, size: int = 32) -> torch.Tensor:
    return torch.randn(clips * T, 3, size, size, generator=torch.Generator().manual_seed(7))


RES2NET, RESNET = Bottle2neck, Bottleneck
NETWORKS = [
    (RES2NET, "tea", {}),
    (RES2NET, "tea", {"form": "text"}),
    (RES2NET, "mta", {}),
    (RES2NET, "2plus1d", {}),
    (RES2NET, "2plus1d_me", {}),
    (RESNET, "tea", {}),
    (RESNET, "mta", {"scale": 2, "form": "text"}),
    (RESNET, "2plus1d", {}),
    (RESNET, "2plus1d", {"conv": "cw"}),
    (RESNET, "2plus1d", {"conv": "conv"}),
    (RESNET, "2plus1d", {"conv": "tsm"}),
    (RESNET, "2plus1d_me", {}),
    (RESNET, "2plus1d_me", {"residual": False}),
    (RESNET, "2plus1d_se", {}),
    (RESNET, "tea_me", {}),
]
ids = [f"{'res2net' if b is RES2NET else 'resnet'}-{n}{'-' if k else ''}{k or ''}" for b, n, k in NETWORKS]


@pytest.mark.parametrize("block, name, kwargs", NETWORKS, ids=ids)
def test_inject_and_eject(block, name, kwargs):
    model, x = network(block), frames()
    weights, before = copy.deepcopy(model.state_dict()), model(x)
    te.inject(model, name, T, **kwargs)
    found, after = te.sites(model), model(x)
    replaced = [s.layer for s in found if s.position == "instead"]
    assert bool(replaced) == (block is RESNET and name in ("tea", "mta"))
    host = {k: v for k, v in model.state_dict().items() if ".temporal." not in k}
    assert list(host) == [k for k in weights if k.rpartition(".")[0] not in replaced]
    assert all(torch.equal(v, weights[k]) for k, v in host.items())
    assert not torch.allclose(after, before, rtol=1e-2)
    added = sum(p.numel() for k, p in model.named_parameters() if ".temporal." in k)
    assert added == sum(s.parameters for s in found)
    te.eject(model)
    assert list(model.state_dict()) == list(weights) and torch.equal(model(x), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("block, name, kwargs", NETWORKS, ids=ids)
def test_every_site_counts(block, name, kwargs):
    """Every parameter gets a gradient in one step, as DDP without find_unused_parameters asks."""
    model = te.inject(network(block, (2, 1, 1, 1)), name, T, **kwargs).train()
    model(frames(2)).square().sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    moved = [k for k, p in model.named_parameters() if ".temporal." in k and p.grad.abs().max() > 0]
    assert len(moved) == sum(".temporal." in k for k, _ in model.named_parameters())


def test_network_overwrites_what_is_its_own():
    """Without gradients the results of ME and the last part take their inputs' memory, with them not."""
    model = te.inject(network(RES2NET, (1, 2, 1, 1)), "tea", T).double()
    excitation, last = model.layer2[1].bn1.temporal.me, model.layer2[1].drop_block.temporal
    for module, flag in ((randomise(excitation), "between_relus"), (randomise(last), "overwrites")):
        x = torch.randn(T, module.channels, 5, 4, dtype=torch.float64)
        with torch.no_grad():
            result = module(x.clone())
            given = x.clone()
            assert module(given).data_ptr() == given.data_ptr() and torch.equal(given, result)
            setattr(module, flag, False)
            given = x.clone()
            assert torch.equal(module(given), result) and torch.equal(given, x)
            setattr(module, flag, True)
        given = x.clone()
        assert torch.equal(module(given), result) and torch.equal(given, x)


def test_sites_of_tea():
    model = te.inject(network(RES2NET, (2, 1, 1, 1)), "tea", T)
    found = te.sites(model)
    assert [(s.layer, s.position, s.placement, s.channels, s.kind) for s in found[:10]] == [
        ("layer1.0.bn1", "out", "me", 104, "ReLU + MotionExcitation"),
        *((f"layer1.0.convs.{i}", "pre", f"mta.{i + 1}", 26, "TemporalConv") for i in range(3)),
        ("layer1.0.pool", "pre", "mta.4", 26, "TemporalConv"),
        ("layer1.1.bn1", "out", "me", 104, "ReLU + MotionExcitation"),
        *((f"layer1.1.convs.{i}", "pre", f"mta.{i + 1}", 26, "TemporalConv") for i in range(3)),
        ("layer1.1.drop_block", "pre", "mta.4", 104, "PartConv"),
    ]
    assert [s.stage for s in found] == [2] * 10 + [3] * 5 + [4] * 5 + [5] * 5
    assert not any(s.note for s in found)


def test_sites_tell_what_starts_anew():
    found = te.sites(te.inject(network(RESNET), "tea", T))
    assert {s.note for s in found} == {"replaces Conv2d; these weights start anew"}
    assert [s.layer for s in found] == [f"{s.block}.conv2" for s in found]
    assert str(found).count("start anew") == 1 and "MotionExcitation + MTA" in str(found)
    assert [s.module.mta.pool.stride for s in found if s.module.mta.stage] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "name", [n for n in timm.list_models("res2net*") + timm.list_models("res2next*") if "101" not in n]
)
def test_all_res2nets(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    te.inject(model, "tea", 8)
    scale = model.layer1[0].scale
    assert len(te.sites(model)) == 16 * (scale + 1)
    assert [k for k in model.state_dict() if ".temporal." not in k] == keys
    assert model(torch.empty(8, 3, 64, 64, device="meta")).shape == (8, 1000)


def test_parameters_of_the_released_network():
    """8 x 3 x 224 x 224, 174 classes: 24.456 M parameters against Res2Net-50's 24.007 M."""
    with torch.device("meta"):
        model = timm.create_model("res2net50_26w_4s", num_classes=174)
    plain_count = sum(p.numel() for p in model.parameters())
    te.inject(model, "tea")
    assert (plain_count, sum(p.numel() for p in model.parameters())) == (24_006_646, 24_456_280)


@pytest.mark.parametrize("name", ["tea", "mta", "2plus1d", "2plus1d_me", "2plus1d_se"])
@pytest.mark.parametrize("stage, blocks", [(2, 3), (3, 4), (4, 6), (5, 3)])
def test_stages_of_table_7(name, stage, blocks):
    with torch.device("meta"):
        model = te.inject(timm.create_model("resnet50"), name, stages=(stage,))
    assert [s.stage for s in te.sites(model)] == [stage] * blocks


def test_networks_change_every_block_of_deep_hosts():
    with torch.device("meta"):
        assert len(te.sites(te.inject(timm.create_model("resnet101"), "tea"))) == 33


def test_block_equals_injected_host():
    """A TEABlock from scratch and a Res2Net block after injection are the same function."""
    for index, stride in ((0, 2), (1, 1)):
        model = te.inject(network(RES2NET, (1, 2, 1, 1)), "tea", T)
        host = randomise(model.layer2[index].double())
        host.conv1.weight.data.div_(10)
        block = te.TEABlock(host.conv1.in_channels, 512, T, stride=stride).double().eval()
        last = host.pool.temporal if index == 0 else host.drop_block.temporal.conv
        pairs = [
            (block.conv1, host.conv1),
            (block.me, host.bn1.temporal.me),
            (block.conv3, host.conv3),
            (block.norm3, host.bn3),
            (block.mta.shifts[3], last),
        ]
        pairs += [(block.mta.shifts[i], host.convs[i].temporal) for i in range(3)]
        state = {}
        for ours, theirs in pairs:
            ours.load_state_dict(theirs.state_dict())
        for i in range(3):
            block.mta.convs[i].weight.data.copy_(host.convs[i].weight)
            block.mta.norms[i].load_state_dict(host.bns[i].state_dict())
        state = {k: v for k, v in host.bn1.state_dict().items() if "temporal" not in k}
        block.norm1.load_state_dict(state)
        if index == 0:
            block.downsample.load_state_dict(host.downsample.state_dict())
        x = torch.randn(T, host.conv1.in_channels, 6, 5, dtype=torch.float64)
        torch.testing.assert_close(block(x), host(x), rtol=1e-12, atol=1e-12)


def test_network_from_scratch_learns():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        te.TEABlock(16, 64, T),
        te.TEABlock(64, 64, T),
        te.TEABlock(64, 128, T, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    x = torch.randn(8 * T, 3, 16, 16)
    x = torch.cat([x, x.unflatten(0, (-1, T)).flip(1).flatten(0, 1)])  # told apart by their order alone
    y = torch.arange(16) // 8
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        logits = model(x).unflatten(0, (-1, T)).mean(1)
        losses.append(nn.functional.cross_entropy(logits, y))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


# --- released weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_the_released_network(training):
    """Equal weights, equal outputs, gradients and running statistics, in float64."""
    released = randomise_norms(plain.ReleasedTEA((2, 2, 1, 1), 5, T)).double().train(training)
    with torch.no_grad():
        for name, p in released.named_parameters():
            if ".shifts." in name or ".me." in name:
                p.add_(torch.randn_like(p), alpha=0.5)
    model = te.inject(network(RES2NET), "tea", T).double().train(training)
    model = te.load_released(model, released.checkpoint())
    x, twin = (frames(2).double().requires_grad_() for _ in range(2))
    y, want = model(x), released(twin)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-8, atol=1e-8 * float(twin.grad.abs().max()))
    statistics = [b for n, b in model.named_buffers() if "running" in n]
    want = [b for n, b in released.named_buffers() if "running" in n]
    for ours, theirs in zip(
        sorted(statistics, key=lambda b: float(b.sum())),
        sorted(want, key=lambda b: float(b.sum())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_released_layout_of_the_whole_network():
    """Every key of a released Res2Net-50 finds its place."""
    released = plain.ReleasedTEA((3, 4, 6, 3), 174, 8).eval()
    model = te.inject(timm.create_model("res2net50_26w_4s", pretrained=False, num_classes=174), "tea").eval()
    video = te.load_released(te.VideoClassifier(model, 8), released.checkpoint()).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in released.parameters())
    x = torch.randn(8, 3, 64, 64)
    torch.testing.assert_close(video(x[None])[0], released(x).mean(0), rtol=1e-4, atol=1e-5)


def test_released_weights_need_the_released_form():
    checkpoint = plain.ReleasedTEA((2, 2, 1, 1), 5, T).checkpoint()
    with pytest.raises(ValueError, match=r"me\.form=text; the released networks"):
        te.load_released(te.inject(network(RES2NET), "tea", T, form="text"), checkpoint)
    with pytest.raises(ValueError, match=r"TEA blocks: inject\(model, 'tea'\)"):
        te.load_released(network(RES2NET), checkpoint)
    with pytest.raises(ValueError, match="no released layout for MotionExcitation"):
        te.load_released(te.inject(network(RESNET), "tea", T), checkpoint)


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MotionExcitation(8, form="paper"), "form must be 'released' or 'text', got 'paper'"),
        (lambda: te.MTA(10, 4), "divide channels=10, got 4"),
        (lambda: te.MTA(8, 4, 1), "at least 2"),
        (lambda: te.MTA(16, 4, groups=3), "groups=3"),
        (lambda: te.MTA(16, 4, stride=2, stage=False), "stride=2 needs stage=True"),
        (lambda: te.MTA(16, 4, stride=0), "stride must be at least 1, got 0"),
        (lambda: te.TEABlock(16, 4), "leaves parts of"),
        (lambda: te.MTA(16, 4)(torch.zeros(6, 16, 2, 2)), "6 frames are not a multiple of n_segment=4"),
        (lambda: te.TEABlock(16, 16, base_width=16)(torch.zeros(8, 15, 2, 2)), "16 channels got input"),
        (lambda: te.inject(network(RESNET), "tee"), "networks: 2plus1d, .*tea"),
        (lambda: te.inject(network(RESNET), "tea", placement="loc2"), "'tea' chooses its own points"),
        (lambda: te.inject(network(RESNET), "tea", form="paper"), "got 'paper'"),
        (lambda: te.inject(network(RESNET), "tea", scale=5), "scale must be at least 2 and divide"),
        (lambda: te.inject(network(RES2NET), "tea", scale=8), "has scale 4; scale=8"),
        (lambda: te.inject(network(RES2NET), "tea", residual=False), "a ReLU behind ME"),
        (lambda: te.inject(network(RES2NET, act_layer=nn.SiLU), "tea"), "must have a ReLU"),
        (lambda: te.inject(timm.create_model("resnet18"), "tea"), "BasicBlock .layer1.0. is no bottleneck"),
        (lambda: te.inject(network(RESNET), "2plus1d", conv="3d"), "unknown conv '3d'; known: shift"),
        (lambda: te.inject(network(RESNET), "2plus1d", excite="ce"), "excite must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_must_be_whole_numbers():
    with pytest.raises(TypeError, match="stride must be an int, got '2'"):
        te.MTA(16, 4, stride="2")


HOOKED = ["layer1.0.bn1", "layer1.0.bn1.temporal", "layer1.0.bn1.temporal.me", "layer1.0.bn1.temporal.relu"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_look_on_change_nothing(name):
    torch.manual_seed(0)
    model = te.inject(network(RES2NET), "tea", T).train().double()
    x, plain = torch.randn(T, 3, 32, 32).double(), te.set_fast(copy.deepcopy(model), False)
    grads = []
    for m in (model, plain):
        m.get_submodule(name).register_forward_hook(lambda *_: None)
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [*HOOKED[2:], "layer1.1.drop_block.temporal"])
def test_tensors_held_by_hooks_stay(name):
    model = te.inject(network(RES2NET), "tea", T).eval()
    held = []
    part = model.get_submodule(name)
    if not name.endswith("relu"):  # which itself works in place
        part.register_forward_pre_hook(lambda _, args: held.append((args[0], args[0].clone())))
    part.register_forward_hook(lambda _, args, output: held.append((output, output.clone())))
    with torch.no_grad():
        model(torch.randn(T, 3, 32, 32))
    assert held
    for now, then in held[:1]:
        assert torch.equal(now, then)


@pytest.mark.parametrize("part", ["norm", "transform", "norm2"])
def test_losses_on_parts_of_motion_excitation(part):
    grads = []
    for fast in (True, False):
        torch.manual_seed(0)
        model = te.set_fast(te.inject(network(RES2NET), "tea", T).train().double(), fast)
        found = []
        me = model.get_submodule("layer1.0.bn1.temporal.me")
        getattr(me, part).register_forward_hook(lambda *args, found=found: found.append(args[2]))
        model(torch.randn(T, 3, 32, 32).double())
        found[0].square().mean().backward()
        grads.append(me.squeeze.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-12)


def test_res2net_block_without_relu():
    model = network(RES2NET)
    del model.layer1[0].relu
    with pytest.raises(ValueError, match="must have a ReLU as its activation 'relu', it has None"):
        te.inject(model, "tea")


def test_bad_keywords():
    with pytest.raises(TypeError, match="reduction"):
        te.inject(network(RESNET), "2plus1d", reduction=4)
    with pytest.raises(TypeError, match="width"):
        te.inject(network(RESNET), "tea", width=4)


def test_failure_leaves_the_model_alone():
    model, x = network(RES2NET), frames()
    keys, before = list(model.state_dict()), model(x)
    model.layer4[0].relu = nn.SiLU()
    with pytest.raises(ValueError, match="layer4"):
        te.inject(model, "tea", T)
    model.layer4[0].relu = nn.ReLU(inplace=True)
    assert list(model.state_dict()) == keys and torch.equal(model(x), before) and not te.sites(model)


def test_eject_follows_the_model():
    """The layer that MTA replaced comes back in the model's dtype and mode, and copies carry their own."""
    model = te.inject(network(RESNET), "mta", T)
    original = model.layer1[0].conv2.replaced.layer
    twin = copy.deepcopy(model)
    te.eject(model.double().train())
    assert model.layer1[0].conv2 is original
    assert original.weight.dtype is torch.float64 and original.training
    te.eject(twin)
    assert twin.layer1[0].conv2.weight.dtype is torch.float32 and twin.layer1[0].conv2 is not original


def test_names_are_taken():
    for register in (te.register_module, te.register_network):
        with pytest.raises(ValueError, match="'tea' is taken"):
            register("tea", lambda *args, **kwargs: [])
    assert "tea" in te.network_names() and "tea" not in te.module_names() and "tea_me" in te.module_names()


def test_reference_shift_is_the_shared_one():
    """The two references of this package agree where they overlap."""
    x, weight = torch.randn(6, 3, 2, 2), torch.randn(3, 1, 3)
    full = torch.diag_embed(weight[:, 0].T).permute(1, 2, 0)
    torch.testing.assert_close(plain.full_temporal_conv(x, full, 3), reference.temporal_conv(x, weight, 3))

"""inject, eject, sites and set_n_segment on the papers' hosts, and what an injected model must survive."""

import copy
import io
import pickle
import re

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import temporal_excite as te
from temporal_excite.hosts import blocks as hosts
from temporal_excite.injection import Insertion
from temporal_excite.modules import registry

T = 4
HOSTS = {"resnet18": 8, "resnet50": 16, "mobilenetv2_050": 10}
MODULES = {
    "action": te.ActionModule,
    "ste": te.ActionModule,
    "ce": te.ActionModule,
    "me": te.ActionModule,
    "shift": te.TemporalConv,
    "tsm": te.TemporalShift,
}


def build(name: str = "resnet18", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **kwargs).eval()
    for module in model.modules():  # timm starts the last norm of a block at zero, which would hide a site
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    return model


def frames(clips: int = 1, size: int = 32) -> torch.Tensor:
    return torch.randn(clips * T, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("module", MODULES)
def test_inject_and_eject(host, module):
    model, x = build(host), frames()
    keys, before = list(model.state_dict()), model(x)
    assert te.inject(model, module, n_segment=T) is model
    found = te.sites(model)
    assert len(found) == HOSTS[host]
    assert all(type(site.module) is MODULES[module] for site in found)
    assert [k for k in model.state_dict() if ".temporal." not in k] == keys
    assert not torch.allclose(model(x), before, rtol=1e-3)
    assert te.eject(model) is model
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)
    assert not te.sites(model)
    te.inject(model, module, n_segment=T)


def test_sites_of_the_papers():
    """Supplement A: every bottleneck of ResNet-50, its shortcut untouched."""
    found = te.sites(te.inject(build("resnet50"), n_segment=T))
    assert [s.channels for s in found] == [64, *[256] * 3, *[512] * 4, *[1024] * 6, *[2048] * 2]
    assert [s.stage for s in found] == [2] * 3 + [3] * 4 + [4] * 6 + [5] * 3
    assert found[0].block == "layer1.0" and found[0].layer == "layer1.0.conv1"
    table = str(found).splitlines()
    assert len(table) == 18 and table[0].startswith("block")
    added = sum(s.parameters for s in found)
    assert table[-1] == f"16 sites, {added:,} added parameters"


def test_keywords_reach_the_module():
    model = te.inject(build(), "action", T, reduction=4, paths=("ce",), shift=False)
    assert te.sites(model)[-1].module.ce.squeeze.out_channels == 512 // 4
    assert "layer1.0.conv1.temporal.ce.squeeze.weight" in model.state_dict()
    assert not any("shift" in key for key in model.state_dict())


@pytest.mark.parametrize("module", [te.STE, lambda channels, n_segment: te.ME(channels, n_segment)])
def test_class_or_factory(module):
    assert len(te.sites(te.inject(build(), module, n_segment=T))) == 8


def test_registered_name():
    class Scale(nn.Module):
        def __init__(self, channels: int, n_segment: int = 8, factor: float = 2.0) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    te.register_module("scale", Scale)
    try:
        assert "scale" in te.module_names()
        model = te.inject(build(), "scale", T, factor=0.5)
        assert {s.module.factor for s in te.sites(model)} == {0.5}
        with pytest.raises(ValueError, match="'scale' is taken"):
            te.register_module("scale", Scale)
    finally:
        from temporal_excite.modules import registry

        del registry._MODULES["scale"]


def blocks(model: nn.Module) -> list[str]:
    return [s.block for s in te.sites(model)]


def test_selection():
    assert blocks(te.inject(build(), n_segment=T, stages=(2, 5))) == [
        f"layer{i}.{j}" for i in (1, 4) for j in (0, 1)
    ]
    assert blocks(te.inject(build(), n_segment=T, include=r"\.1$")) == [f"layer{i}.1" for i in (1, 2, 3, 4)]
    assert blocks(te.inject(build(), n_segment=T, include="layer[12]", exclude=r"\.0")) == [
        "layer1.1",
        "layer2.1",
    ]
    assert blocks(te.inject(build(), n_segment=T, exclude=lambda name: "layer4" in name))[-1] == "layer3.1"
    assert blocks(te.inject(build(), n_segment=T, every=2)) == [f"layer{i}.0" for i in (1, 2, 3, 4)]


def test_every_second_block_of_deep_resnets():
    with torch.device("meta"):
        deep = timm.create_model("resnet101")
        named = blocks(te.inject(deep, "shift"))
        assert [named.count(f"layer3.{i}") for i in range(4)] == [1, 0, 1, 0]
        assert len(te.sites(deep)) == 2 + 2 + 12 + 2
        assert len(te.sites(te.inject(timm.create_model("resnet101"), "shift", every=1))) == 33


@pytest.mark.parametrize("module", [*MODULES, "te"])
def test_without_memory(module):
    """Shapes alone, as for an estimate of memory: PyTorch cannot move a module there."""
    with FakeTensorMode():
        model = te.inject(build(), module, T)
        assert model(frames()).shape == (T, 5)
        model.train()(frames()).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        assert not te.sites(te.eject(model))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("placement", ["loc1", "loc2", "loc3", "loc4"])
def test_placements(host, placement):
    """Each placement fires once a block, and the shortcut is left alone."""
    model, x = build(host), frames()
    calls = []

    class Zero(nn.Module):
        def __init__(self, channels: int, n_segment: int) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x.shape[1])
            return x.detach()

    te.inject(model, Zero, T, placement)
    found = te.sites(model)
    model(x)
    assert calls == [s.channels for s in found]
    for site in found[:3]:
        block = model.get_submodule(site.block)
        channels = next(p.shape[1] for p in block.parameters() if p.ndim == 4)
        z = torch.rand(T, channels, 8, 8, requires_grad=True)
        shortcut = block.downsample(z) if getattr(block, "downsample", None) is not None else z
        out = block(z)
        after = out > 0 if "resnet" in host else torch.ones_like(out)  # the ReLU after the addition
        (want,) = torch.autograd.grad((shortcut * after).sum(), z)
        (got,) = torch.autograd.grad(out.sum(), z)
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("module", ["action", "shift"])
def test_identity_start_keeps_the_networks_output(host, module):
    model, x = build(host), frames()
    before = model(x)
    assert torch.equal(te.inject(model, module, n_segment=T, identity_start=True)(x), before)


def test_one_frame_clips():
    model = te.inject(build(), n_segment=1)
    x = frames()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_set_n_segment():
    model, x = te.inject(build(), n_segment=T), frames(2)
    a = model(x)
    assert te.set_n_segment(model, 8) is model
    assert {m.n_segment for s in te.sites(model) for m in s.module.modules() if hasattr(m, "n_segment")} == {
        8
    }
    assert not torch.allclose(model(x), a, rtol=1e-3)
    assert torch.equal(te.set_n_segment(model, T)(x), a)


@pytest.mark.parametrize("host", HOSTS)
def test_copies_run_their_own_modules(host):
    model, x = te.inject(build(host), n_segment=T), frames()
    before = model(x)
    ema = ModelEmaV3(model, decay=0.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ema.module):
        assert torch.equal(twin(x), before)
        for site in te.sites(twin):
            nn.init.zeros_(site.module.shift.weight)
        assert not torch.allclose(twin(x), before, rtol=1e-3)
        assert torch.equal(model(x), before)
    ema.update(model)
    assert torch.equal(ema.module(x), before)


@pytest.mark.parametrize("host", ["resnet18", "mixnet_s"])
def test_a_module_put_in_the_place_of_another_runs(host):
    """As wrappers are, of sharding or of adapters."""
    model = te.inject(build(host), "tsm", n_segment=T)
    ran = []
    for name, module in list(model.named_modules()):
        if isinstance(module, te.TemporalShift):
            parent, _, child = name.rpartition(".")
            other = nn.Identity()
            other.register_forward_hook(lambda *_: ran.append(1))
            setattr(model.get_submodule(parent), child, other)
    torch.testing.assert_close(model(frames()), build(host)(frames()))
    assert len(ran) == len(te.sites(model))


def test_state_dict_round_trips():
    x, plain, source = frames(), build(), te.inject(build(), n_segment=T)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target = te.inject(timm.create_model("resnet18", num_classes=5).eval(), n_segment=T)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(target(x), source(x))
    missing, unexpected = target.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".temporal." in key for key in missing)


def test_memory_format_dtype_and_mode():
    model, x = te.inject(build("mobilenetv2_050").train(), n_segment=T), frames()
    assert all(s.module.training for s in te.sites(model))
    model = model.eval()
    before = model(x)
    model.to(memory_format=torch.channels_last)
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, before, rtol=1e-3, atol=1e-3 * before.detach().abs().max().item())
    double = te.inject(build().double(), n_segment=T)
    assert double(frames().double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(double.float()(frames())).all()


def test_gradients_reach_every_parameter():
    model = te.inject(build("mobilenetv2_050").train(), n_segment=T)
    model(frames(2)).pow(2).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


def stage(module: str, **kwargs) -> nn.Module:
    """The first stage holds whole sites; the others would add nothing but time."""
    return te.inject(build(), module, n_segment=T, **kwargs).double().layer1


def features(clips: int) -> torch.Tensor:
    """Input of the first stage. Where operations go by size, 80 clips are large."""
    return torch.randn(clips * T, 64, 8, 8, generator=torch.Generator().manual_seed(7)).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("module", ["action", "te", "tsm"])
def test_compile_and_export(module, causal):
    model, x = stage(module, causal=causal), features(2)
    before = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), before)
    batch = torch.export.Dim("clips", min=1, max=128)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: T * batch},)).module()
    for clips in (1, 2, 3, 80):
        x = features(clips)
        torch.testing.assert_close(exported(x), model(x))


def test_export_where_another_device_is_the_default():
    model, x = te.inject(build(), "shift", n_segment=T).eval(), frames()
    with torch.device("meta"):
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is of one size of frames
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("module", [*MODULES, "te"])
def test_jit_trace(module, causal):
    """It traces a second time, without gradients, and compares."""
    model = stage(module, causal=causal)
    traced = torch.jit.trace(model, features(2))
    for clips in (1, 2, 3, 80):
        x = features(clips)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("module", ["action", "te", "tsm"])
def test_compiled_once_for_every_number_of_clips(module):
    graphs = []
    model = stage(module)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for clips in (2, 3, 80):
        x = features(clips)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_injecting_into_a_compiled_model_counts():
    model, x = build(), frames()
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    te.inject(model, "tsm", n_segment=T)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before, rtol=1e-3)
    te.eject(model)
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("part", ["", "layer1", "layer1.1"])
def test_networks_of_one_class_compile_apart(part):
    plain = build()
    model = te.inject(copy.deepcopy(plain), "tsm", n_segment=T, every=1)
    restored = te.eject(copy.deepcopy(model))
    x = frames() if not part else torch.randn(T, 64, 8, 8)
    parts = [network.get_submodule(part) for network in (plain, model, restored, copy.deepcopy(model))]
    assert not torch.allclose(parts[0](x), parts[1](x), rtol=1e-3)
    for network in parts + parts[::-1]:
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), network(x))


class Unmovable(te.STE):
    """Behind the first stage it holds a tensor without memory."""

    def __init__(self, channels):
        super().__init__(channels, T)
        if channels > 64:
            self.register_buffer("nothing", torch.empty(1, device="meta"))


BAD = [
    (dict(module="acton"), ValueError, "unknown module 'acton'; known modules: action, ce, me"),
    (dict(module=3), TypeError, "got 3"),
    (dict(placement="loc5"), ValueError, "unknown placement 'loc5'; known: loc1, loc2, loc3, loc4"),
    (dict(n_segment=0), ValueError, "n_segment must be at least 1, got 0"),
    (dict(n_segment=-8), ValueError, "n_segment must be at least 1, got -8"),
    (dict(n_segment="8"), TypeError, "n_segment must be an int, got '8'"),
    (dict(every=0), ValueError, "every must be at least 1, got 0"),
    (dict(stages=(2, 6)), ValueError, r"stages \[6\] .* \[2, 3, 4, 5\]"),
    (dict(include="layer9"), ValueError, "no site in ResNet.*layer9"),
    (dict(exclude=""), ValueError, "no site in ResNet"),
    (dict(reduction=0), ValueError, "reduction must be at least 1, got 0"),
    (dict(reductions=4), TypeError, "reductions"),
    (dict(module="tsm", identity_start=True), TypeError, "identity_start"),
    (
        dict(module=lambda channels, n_segment: te.STE(channels) if channels < 128 else None),
        TypeError,
        r"gave None for layer2\.1, not a torch\.nn\.Module",
    ),
    (dict(module=lambda channels, n_segment: Unmovable(channels)), NotImplementedError, "meta"),
]


@pytest.mark.parametrize("kwargs, error, message", BAD)
def test_bad_arguments_leave_the_model_alone(kwargs, error, message):
    model = build()
    keys, before = list(model.state_dict()), model(frames())
    with pytest.raises(error, match=message):
        te.inject(model, **{"n_segment": T, **kwargs})
    assert list(model.state_dict()) == keys and torch.equal(model(frames()), before)
    assert not te.sites(model)


def test_wrong_states():
    model = build()
    for call in (te.eject, lambda m: te.set_n_segment(m, 8)):
        with pytest.raises(RuntimeError, match="ResNet holds no temporal modules"):
            call(model)
    te.inject(model, "tsm", n_segment=T)
    with pytest.raises(RuntimeError, match=r"ResNet already holds 8 .*eject"):
        te.inject(model, "action", n_segment=T)
    with pytest.raises(ValueError, match="n_segment must be at least 1, got 0"):
        te.set_n_segment(model, 0)
    assert {s.module.n_segment for s in te.sites(model)} == {T}
    with pytest.raises(ValueError, match=re.escape("3 frames are not a multiple of n_segment=4")):
        model(torch.zeros(3, 3, 32, 32))


def test_models_without_sites():
    with pytest.raises(ValueError, match="no site in Sequential"):
        te.inject(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        te.inject("resnet50")


def test_every_of_networks():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="every must be"):
            te.inject(timm.create_model("resnet50"), "mta", every=0)
        assert len(te.sites(te.inject(timm.create_model("resnet50"), "mta", every=2))) == 9


def test_taken_name_in_networks():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    model.layer4[0].conv2.temporal = 1
    with pytest.raises(ValueError, match="of its own"):
        te.inject(model, "2plus1d")
    assert not te.sites(model)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"stages": 2}, TypeError),
        ({"include": ["layer1"]}, TypeError),
        ({"exclude": 5}, TypeError),
        ({"include": "["}, ValueError),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind(arguments, error):
    model = build()
    with pytest.raises(error, match=next(iter(arguments))):
        te.inject(model, "tsm", T, **arguments)
    assert not te.sites(model)


def test_registered_must_be_callable():
    with pytest.raises(TypeError, match="'mine' needs something to call, got 5"):
        te.register_module("mine", 5)
    assert "mine" not in te.module_names()
    for name in (None, ""):
        with pytest.raises(TypeError, match="a name is a string"):
            te.register_module(name, te.TemporalShift)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([("pre:nope", 8)], "nope"),
        ([("foo:conv1", 8)], "unknown anchor 'foo:conv1'"),
        ([("pre:conv1", 512), ("out:conv1", 512)], "cannot hold two modules"),
    ],
    ids=str,
)
def test_plans_are_checked_before_the_model_is_touched(last, message, monkeypatch):
    def plan(blocks, n_segment):
        places = [(block, "pre:conv1", block.channels("pre:conv1")) for block in blocks[:-1]]
        places += [(blocks[-1], *place) for place in last]
        return [Insertion(b, anchor, "mine", te.TemporalShift(c, n_segment)) for b, anchor, c in places]

    monkeypatch.setitem(registry._NETWORKS, "mine", plan)
    model = build()
    with pytest.raises(Exception, match=message):
        te.inject(model, "mine", T)
    assert not te.sites(model) and not any("temporal" in key for key in model.state_dict())


def test_plans_may_be_generators(monkeypatch):
    def plan(blocks, n_segment):
        for block in blocks:
            yield Insertion(
                block, "pre:conv1", "mine", te.TemporalShift(block.channels("pre:conv1"), n_segment)
            )

    monkeypatch.setitem(registry._NETWORKS, "mine", plan)
    assert len(te.sites(te.inject(build(), "mine", T))) == 8


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (lambda blocks, n_segment: [], ValueError, "its plan gave no insertion"),
        (lambda blocks, n_segment: ["conv1"], TypeError, "must give Insertion objects, got 'conv1'"),
    ],
)
def test_plans_without_insertions(plan, error, message, monkeypatch):
    monkeypatch.setitem(registry._NETWORKS, "mine", plan)
    with pytest.raises(error, match=message):
        te.inject(build(), "mine", T)


def test_one_module_for_two_places_is_refused():
    shared, model = te.TemporalShift(64, T), build()
    with pytest.raises(ValueError, match="the same TemporalShift for two places"):
        te.inject(model, lambda channels, n_segment: shared, T, stages=(2,))
    assert not te.sites(model)


def test_set_n_segment_changes_all_or_none():
    class Fixed(nn.Module):
        n_segment = property(lambda self: T)

        def forward(self, x):
            return x

    made = iter([te.TemporalShift(64, T), Fixed()])
    model = te.inject(build(), lambda channels, n_segment: next(made), T, stages=(2,))
    with pytest.raises(AttributeError):
        te.set_n_segment(model, 8)
    assert [site.module.n_segment for site in te.sites(model)] == [T, T]


@pytest.mark.parametrize("function", [te.sites, te.eject, lambda m: te.set_fast(m, True)])
def test_models_must_be_modules(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("resnet18")


def test_layers_called_by_keyword(monkeypatch):
    class Keyword(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return x + self.conv(input=x)

    monkeypatch.setattr(hosts, "_HOSTS", hosts.known_hosts())
    te.register_host(Keyword, loc1="pre:conv", loc4="out:conv")
    model = te.inject(nn.Sequential(Keyword(8)), "tsm", T)
    with pytest.raises(TypeError, match="Conv2d is called with keyword arguments alone"):
        model(torch.rand(T, 8, 4, 4))
    te.inject(te.eject(model), "tsm", T, placement="loc4")(torch.rand(T, 8, 4, 4))


@pytest.mark.parametrize("position", ["pre", "out", "around", "instead"])
def test_every_position_gives_modules_channels_first(position, monkeypatch):
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.fc(x)

    class Noted(nn.Module):
        def forward(self, *inputs):
            self.shapes = [tuple(x.shape) for x in inputs]
            return inputs[-1]

    def plan(blocks, n_segment):
        return [Insertion(block, f"{position}:fc", "mine", Noted()) for block in blocks]

    monkeypatch.setattr(hosts, "_HOSTS", hosts.known_hosts())
    te.register_host(ChannelsLast, loc1="pre:fc", nhwc=True)
    monkeypatch.setitem(registry._NETWORKS, "mine", plan)
    model = te.inject(nn.Sequential(ChannelsLast()), "mine", T)
    assert model(torch.rand(T, 5, 6, 8)).shape == (T, 5, 6, 8)
    shapes = te.sites(model)[0].module.shapes
    assert shapes == [(T, 8, 5, 6)] * (2 if position == "around" else 1)


def test_stages_from_an_iterator():
    assert len(te.sites(te.inject(build(), "tsm", T, stages=iter((2, 3))))) == 4

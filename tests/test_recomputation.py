"""What the backward pass computes again is what it would have found kept: gradients, memory, errors."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from speed import saved_bytes
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import temporal_excite as te
from temporal_excite import passes
from temporal_excite.hosts import blocks
from temporal_excite.modules import TemporalModule
from temporal_excite.modules.tea import MotionExcitation
from temporal_excite.recomputation import Recomputable

MODULES = ("tsm", "shift", "ste", "ce", "me", "action", "te", "tea_me")
NETWORKS = [
    *(("resnet50", module) for module in ("tsm", "shift", "action", "te", "tea_me")),
    ("res2net50_26w_4s", "tea"),
]


class Block(nn.Module):
    """A residual block of one convolution behind the module."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


@pytest.fixture(scope="module", autouse=True)
def _block_is_known():
    before = blocks.known_hosts()
    te.register_host(Block, loc1="pre:conv", loc2="out:conv", loc4="out:norm")
    yield
    blocks._HOSTS.clear()
    blocks._HOSTS.update(before)


def network(module="action", channels=8, n_segment=4, dtype=torch.float64, **kwargs):
    """Two blocks, with nothing at a special value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), Block(channels), Block(channels))
    te.inject(model, module, n_segment=n_segment, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def close(found, expected):
    """Two lists of tensors of float64."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1, b.abs().max()))


def gradients(model, x):
    """Of the input and all parameters, and the buffers after the step."""
    x = x.detach().requires_grad_()
    grads = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    return [*grads, *(b.double() for b in model.buffers())]


@settings(max_examples=40, deadline=None)
@given(
    module=st.sampled_from(MODULES),
    t=st.integers(1, 4),
    channels=st.integers(4, 9),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    last=st.booleans(),
    causal=st.booleans(),
    training=st.booleans(),
)
def test_gradients_are_those_of_the_published_form(
    module, t, channels, height, width, last, causal, training
):
    model = network(module, channels, t, causal=causal).train(training)
    x = torch.randn(2 * t, 3, height + 1, width, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    plain = te.set_fast(copy.deepcopy(model), False)
    close(gradients(model, x), gradients(plain, x))


@pytest.mark.parametrize(("backbone", "module"), NETWORKS)
def test_training_keeps_what_the_plain_network_keeps(backbone, module):
    x = torch.randn(8, 3, 128, 128)
    plain = saved_bytes(timm.create_model(backbone).train(), x)
    model = te.inject(timm.create_model(backbone), module).train()
    assert saved_bytes(model, x) <= 1.05 * plain
    assert saved_bytes(te.set_fast(model, False), x) > 1.05 * plain


@pytest.mark.parametrize(("backbone", "module"), NETWORKS)
def test_networks_learn_the_same(backbone, module, monkeypatch):
    x = torch.randn(8, 3, 32, 32)
    model = te.inject(timm.create_model(backbone), module).train()
    spared = gradients(copy.deepcopy(model), x)
    monkeypatch.setattr(passes, "as_recomputable", lambda x, y, module: y)
    monkeypatch.setattr(passes, "note_norm_output", lambda norm, x, y: None)
    for found, expected in zip(spared, gradients(model, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_me_needs_its_result_alone(memory_format):
    model = timm.create_model("res2net50_26w_4s", num_classes=2)
    model.layer2, model.layer3, model.layer4, model.fc = (nn.Identity() for _ in range(4))
    te.inject(model, "tea", n_segment=4).double().train().to(memory_format=memory_format)
    plain = te.set_fast(copy.deepcopy(model), False)
    x = torch.randn(8, 3, 28, 36, dtype=torch.float64).contiguous(memory_format=memory_format)
    close(gradients(model, x), gradients(plain, x))


def test_nothing_holds_the_output(monkeypatch):
    outputs = []

    def watched(x, y, module, lent=passes.as_recomputable):
        outputs.append(weakref.ref(y))
        return lent(x, y, module)

    monkeypatch.setattr(passes, "as_recomputable", watched)
    model = network()
    loss = model(torch.randn(8, 3, 6, 5, dtype=torch.float64)).sum()
    assert len(outputs) == 2
    assert not any(ref() is not None for ref in outputs)
    loss.backward()


@pytest.mark.parametrize("module", ["shift", "ste", "ce", "me", "action", "tea_me"])
def test_twice_and_of_gradients(module):
    model = network(module, channels=4).eval()
    plain = te.set_fast(copy.deepcopy(model), False)
    x = torch.randn(4, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for m in (model, plain):
        loss = m(x).square().sum()
        once = torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), [x, *m.parameters()])
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a, b)
        results.append([*once, *second])
    close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("backbone", "module"), [("resnet18", "action"), ("res2net50_26w_4s", "tea")])
def test_inside_activation_checkpointing(backbone, module, reentrant):
    x = torch.randn(8, 3, 32, 32, requires_grad=True)
    model = te.inject(timm.create_model(backbone), module).train()
    expected = gradients(copy.deepcopy(model), x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    spared = Checkpointed()
    if reentrant:  # which has no torch.autograd.grad
        x.grad = None
        spared(x).square().sum().backward()
        found = [x.grad, *(p.grad for p in spared.parameters())]
    else:
        found = gradients(spared, x)
        assert saved_bytes(spared, x) <= x.nbytes
    count = 1 + len(list(model.parameters()))  # the norms' statistics move twice
    for a, b in zip(found[:count], expected[:count], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max()))


@pytest.mark.parametrize("around", [torch.autograd.graph.save_on_cpu, contextlib.nullcontext])
def test_hooks_around_see_what_is_kept(around):
    model, x = network(), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x)
    with around():
        found = gradients(model, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", ["shift", "action", "tea_me"])
def test_backward_outside_of_autocast_runs_again_under_it(module, monkeypatch):
    x, found = torch.randn(8, 3, 6, 5), []
    for spare in (True, False):
        model = network(module, dtype=torch.float32, placement="loc4" if module == "tea_me" else "loc1")
        if not spare:
            monkeypatch.setattr(passes, "as_recomputable", lambda x, y, module: y)
            monkeypatch.setattr(passes, "note_norm_output", lambda norm, x, y: None)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["1.conv.weight", "1.conv.temporal.ste.weight"])
def test_weights_changed_before_backward_are_an_error(name):
    model, x = network(), torch.randn(8, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    loss = model(x).sum()
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("module", ["shift", "action", "me", "tea_me"])
def test_weights_lent_for_a_call(module):
    model, x = network(module), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    plain = te.set_fast(copy.deepcopy(model), False)
    weights = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    spared, published = (
        torch.autograd.grad(functional_call(m, weights, x).square().sum(), list(weights.values()))
        for m in (model, plain)
    )
    close(spared, published)


@pytest.mark.parametrize("module", ["action", "me", "tea_me"])
def test_mode_changed_before_backward(module):
    model, x = network(module), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x)
    x.requires_grad_()
    loss = model(x).square().sum()
    model.eval()
    for a, b in zip(torch.autograd.grad(loss, [x, *model.parameters()]), expected, strict=False):
        assert torch.equal(a, b)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("module", ["action", "me", "tea_me", "shift", "tsm"])
def test_clips_of_another_length_before_backward(module):
    x, grads = torch.randn(8, 3, 6, 5, dtype=torch.float64), []
    for fast in (True, False):
        model = te.set_fast(network(module), fast)
        loss = model(x).square().sum()
        te.set_n_segment(model, 2)
        loss = loss + model(x).square().sum()
        te.set_n_segment(model, 8)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    close(*grads)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("module", ["action", "me", "tea_me", "shift"])
def test_hooks_of_tensors_run_once(module, create_graph):
    x, grads = torch.randn(8, 3, 6, 5, dtype=torch.float64), []
    for fast in (True, False):
        model = te.set_fast(network(module), fast)
        model[0].register_forward_hook(lambda layer, args, y: y.register_hook(lambda grad: 3 * grad) and None)
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: 2 * grad)
        loss = model(x).square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
        grads.append([g.detach() for g in found])
    close(*grads)


@pytest.mark.parametrize("placement", ["loc1", "loc4"])
def test_the_shifted_input_is_recomputed_once(placement, monkeypatch):
    runs = []
    monkeypatch.setattr(
        passes, "_temporal_conv", lambda *args, run=passes._temporal_conv: runs.append(0) or run(*args)
    )
    model, x = network(placement=placement), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    loss = model(x).sum()
    assert len(runs) == 2
    for _ in range(2):
        runs.clear()
        loss.backward(retain_graph=True)
        assert len(runs) == 4  # and the adjoint convolutions


@pytest.mark.parametrize("placement", ["loc1", "loc4"])
@pytest.mark.parametrize("module", ["action", "tea_me"])
def test_statistics_move_once(module, placement):
    model, x = network(module, placement=placement), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    plain = te.set_fast(copy.deepcopy(model), False)
    for m in (model, plain):
        m(x).square().sum().backward()
    counts = [b.item() for name, b in model.named_buffers() if "num_batches" in name]
    assert counts and set(counts) == {1}
    close([b.double() for b in model.buffers()], [b.double() for b in plain.buffers()])


def test_statistics_changed_before_backward_are_an_error():
    """Behind a norm the module's input is computed again by them."""
    model, x = network("tea_me", placement="loc4").eval(), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    loss = model(x.requires_grad_()).sum()
    model[1].norm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_squeeze_of_another_kind_may_change_its_input():
    def change(model):
        for site in te.sites(model):
            site.module.me.squeeze = nn.Sequential(nn.ReLU(inplace=True), site.module.me.squeeze)

    compared(change, "me")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("module", ["action", "me"])
@pytest.mark.parametrize("part", ["squeeze", "transform"])
def test_biases_count(part, module, training):
    """As fusing a convolution with its batch norm makes them."""

    def change(model):
        for site in te.sites(model):
            conv = site.module.me.get_submodule(part)
            conv.bias = nn.Parameter(conv.weight.new_ones(conv.out_channels))

    compared(change, module, training)


class Adapted(nn.Module):
    """A layer with something random beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout()

    def forward(self, x):
        return self.layer(x) + self.dropout(x).mean(1, keepdim=True)


def adapted(model):
    for module in [m for m in model.modules() if isinstance(m, te.ME | te.CE)]:
        module.squeeze, module.expand = Adapted(module.squeeze), Adapted(module.expand)


def normed(model):
    for module in (m for m in model.modules() if isinstance(m, te.ActionModule)):
        nn.utils.parametrizations.spectral_norm(module.me.squeeze)


def listened(model):
    for module in (m for m in model.modules() if isinstance(m, te.ActionModule)):
        for layer in (module.me.squeeze, module.ce.squeeze, module.ce.expand, module.me.transform):
            layer.register_forward_hook(lambda layer, args, y: y + torch.rand(1))


def viewed(model):
    """As FSDP has it: what was a parameter is an attribute, a view of a flat one."""
    for part in list(model.modules()):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and isinstance(part, nn.Conv1d | nn.Conv2d | te.STE):
                del part._parameters[name]
                part.register_parameter(f"flat_{name}", nn.Parameter(parameter.detach().flatten()))
                setattr(part, name, part._parameters[f"flat_{name}"].view_as(parameter))


def bound(model):
    """Methods of the instance, as libraries set them to run something around."""
    for module in [m for m in model.modules() if isinstance(m, te.ActionModule)]:
        module.me.norm.forward = types.MethodType(nn.BatchNorm2d.forward, module.me.norm)
        module.shift.forward = module.shift.forward
        module.ste.gate = module.ste.gate


@pytest.mark.parametrize("change", [adapted, normed, listened, viewed, bound])
def test_parts_that_others_changed(change):
    x, found = torch.randn(8, 3, 6, 5, dtype=torch.float64), []
    for fast in (True, False):
        model = te.set_fast(network(channels=16), fast)
        change(model)
        torch.manual_seed(1)
        found.append(gradients(model.double(), x))
    close(*found)


def test_backward_hooks_of_parts_get_the_parts():
    model, seen = network(), []
    for module in [m for m in model.modules() if isinstance(m, te.ActionModule)]:
        for part in (module.me.norm, module.me.squeeze, module.ce.expand):
            part.register_full_backward_hook(lambda part, *_: seen.append(part))
    model(torch.randn(8, 3, 6, 5, dtype=torch.float64)).sum().backward()
    assert len(seen) == 6 and set(seen) <= set(model.modules())


def test_outputs_kept_on_a_module_are_let_go():
    model, outputs = network(), []
    module = model[1].conv.temporal
    module.register_forward_hook(lambda module, args, y: setattr(module, "features", y))
    for _ in range(3):
        model(torch.randn(8, 3, 6, 5, dtype=torch.float64)).sum().backward()
        outputs.append(weakref.ref(module.features))
    gc.collect()
    assert [ref() is None for ref in outputs] == [True, True, False]


@pytest.mark.parametrize("name", ["ce.temporal", "reduce", "expand"])
def test_a_replaced_temporal_convolution_is_an_error(name):
    class Other(nn.Conv1d):
        pass

    module = te.ActionModule(8, 4) if "." in name else te.TEModule(8, 4)
    conv = module.get_submodule(name)
    module.set_submodule(name, Other(conv.in_channels, conv.out_channels, 3, padding=1, bias=False))
    with pytest.raises(TypeError, match=r"Other took the place of .*torch\.nn\.utils\.parametrize"):
        module(torch.randn(4, 8, 3, 3))


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [pruned, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("module", ["ste", "ce", "me", "action", "te", "tea_me"])
def test_weights_made_at_each_call(module, change):
    x, found = torch.randn(8, 3, 6, 5, dtype=torch.float64), []

    def build(fast):
        model = te.set_fast(network(module), fast)
        for part in list(model.modules()):
            if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear | te.STE):
                change(part)
        return model

    for fast in (True, False):
        model = build(fast)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        other = build(fast)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            found.append([other.eval()(x), *model.state_dict().values()])
            assert torch.equal(found[-1][0], model.eval()(x))
    close(*found)


def test_what_hooks_make_of_the_input_counts():
    x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    for hook in (lambda layer, args: args[0].mul_(2), lambda layer, args: args[0] * 2):
        model = network("shift")
        model[1].conv.register_forward_pre_hook(hook)
        found = gradients(model, x)
        model = network("shift")
        model[1].conv.temporal.register_forward_hook(lambda layer, args, y: y * 2)  # not run again: kept
        for a, b in zip(found, gradients(model, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("module", [te.STE, te.TemporalConv])
def test_replicas_of_data_parallel_learn(module):
    """They hold copies of the parameters, which are no parameters of theirs."""
    source = module(8, 4).double()
    x = torch.randn(8, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    replica = source._replicate_for_data_parallel()
    replica.weight = source.weight.clone()
    found = torch.autograd.grad(replica(x).square().sum(), [x, source.weight])
    for a, b in zip(found, torch.autograd.grad(source(x).square().sum(), [x, source.weight]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("module", "kwargs"), [("tsm", {}), ("shift", {}), ("action", {}), ("action", {"shift": False})]
)
def test_input_without_a_gradient(module, kwargs):
    model = te.inject(nn.Sequential(Block(8)).double(), module, n_segment=4, **kwargs)
    x = torch.randn(8, 8, 6, 5, dtype=torch.float64)
    plain = te.set_fast(copy.deepcopy(model), False)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, plain)]
    close(*grads)
    assert saved_bytes(model, x) <= saved_bytes(plain, x) - (module != "tsm") * 0.9 * x.nbytes


def test_graph_of_gradients_after_a_pass_without():
    model, second = network("ste", channels=4).eval(), []
    x = torch.randn(4, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    for before in (True, False):
        loss = model(x).square().sum()
        if before:  # asks for the input of the convolution alone
            torch.autograd.grad(loss, model[2].conv.weight, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()]))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)


def test_own_tea_block_keeps_no_input_of_its_convolutions():
    block, x = te.TEABlock(64, 256), torch.randn(8, 64, 8, 8)
    assert saved_bytes(block, x) < saved_bytes(te.set_fast(block, False), x)


def test_an_input_taken_by_a_hook_is_an_ordinary_tensor(tmp_path):
    model, taken = network("shift"), []
    model[1].conv.register_forward_hook(lambda layer, args, output: taken.append(args[0]))
    model[1].conv.register_full_backward_hook(lambda layer, grads, _: taken.append(grads[0]))
    x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    expected = gradients(network("shift"), x)
    for a, b in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(a, b)
    y, grad = taken
    assert y.shape == grad.shape
    assert type(y * 2) is type(torch.cat([y, y])) is type(y.detach()) is torch.Tensor
    torch.save(y, tmp_path / "y.pt")
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, y)


def test_modules_of_others_run_once():
    class Noise(TemporalModule):
        runs = 0

        def __init__(self, channels, n_segment):
            super().__init__(channels, n_segment)
            self.shift = te.TemporalShift(channels, n_segment)

        def forward(self, x):
            type(self).runs += 1
            return self.shift(F.dropout(x))

    model = network(Noise)
    x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    loss = model(x).sum()
    (found,) = torch.autograd.grad(loss, model[1].conv.weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, model[1].conv.weight)
    assert torch.equal(found, again)
    assert Noise.runs == 2


@pytest.mark.parametrize("changed", ["input", "output"])
def test_modules_of_others_may_change_what_they_have(changed):
    """Unseen by autograd: the input is then no longer what the output was computed of."""

    class Doubling(te.TemporalShift):
        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                (x if changed == "input" else y).mul_(2)
            return y

    convs, x = [nn.Conv2d(8, 8, 1).double() for _ in range(2)], torch.randn(8, 8, 6, 5, dtype=torch.float64)
    found = []
    for taken in (passes.as_recomputable, lambda x, y, module: y):
        module, inner = Doubling(8, 4), convs[0](x)
        y = convs[1](taken(inner, module(inner), module))
        found.append(torch.autograd.grad(y.square().sum(), [p for conv in convs for p in conv.parameters()]))
    close(*found)


def test_behind_a_norm_that_changes_nothing_is_lost():
    for training in (True, False):
        model = network("tea_me", placement="loc4").train(training)
        x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
        plain = te.set_fast(copy.deepcopy(model), False)
        close(gradients(model, x), gradients(plain, x))


def compared(change, module="shift", training=True, last=False, around=contextlib.nullcontext, **kwargs):
    """Output and gradients of the fast and the published form of a changed network."""
    layout = torch.channels_last if last else torch.contiguous_format
    results = []
    for fast in (True, False):
        model = te.set_fast(network(module, **kwargs), fast).train(training).to(memory_format=layout)
        change(model)
        x = torch.randn(8, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with around():
            y = model(x.contiguous(memory_format=layout))
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    close(*results)


@pytest.mark.parametrize("module", ["tsm", "shift", "action"])
def test_hooks_that_keep_no_strides(module):
    """As ``save_on_cpu(pin_memory=True)`` and FSDP's offloading."""

    def around():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t), lambda t: t
        )

    compared(lambda model: None, module, last=True, around=around)


@pytest.mark.parametrize("module", ["tsm", "shift", "action", "te"])
@pytest.mark.parametrize("placement", ["loc1", "loc4"])
def test_hooks_that_change_the_output_unseen(module, placement):
    def clip(_, __, output):
        with torch.no_grad():
            output.clamp_(-0.5, 0.5)

    def change(model):
        for site in te.sites(model):
            site.module.register_forward_hook(clip)

    compared(change, module, placement=placement)


def test_hooks_on_the_norm_of_motion_excitation():
    def change(model):
        for site in te.sites(model):
            site.module.me.norm.register_forward_hook(lambda _, __, output: 3 * output)

    compared(change, "me", training=False)


def test_output_of_the_shift_is_left_alone():
    model, seen = network("action").eval(), []
    shift = te.sites(model)[0].module.shift
    shift.register_forward_hook(lambda _, __, output: seen.extend([output, output.clone()]))

    class Same(nn.Module):
        def forward(self, x):
            return x.view_as(x)

    te.sites(model)[1].module.shift = Same()
    x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
        assert torch.equal(*seen)
        close([found], [te.set_fast(model, False)(x)])


class Signs(nn.Parameter):
    """A weight with its own way to convolve."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.conv2d:
                args = (args[0], args[1].sign(), *args[2:])
            return func(*args, **(kwargs or {}))


def test_weights_of_other_kinds():
    def change(model):
        for block in list(model)[1:]:
            block.conv.weight = Signs(block.conv.weight.detach().clone())

    compared(change)


def test_hooks_on_saved_tensors_disabled():
    model = network("shift").train()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        model(torch.randn(8, 3, 6, 5, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_changes_of_a_rectified_result(training):
    """Behind TEA's ME the block's ReLU has nothing to do, but after a hook it may."""
    torch.manual_seed(0)
    block = {"num_classes": 3, "zero_init_last": False}
    model = te.inject(timm.create_model("res2net50_26w_4s", **block).double(), "tea", 2).train(training)
    for site in te.sites(model):
        if "me" in site.placement:
            module = site.module if not hasattr(site.module, "me") else site.module.me
            module.register_forward_hook(lambda _, __, output: (output.sub_(0.3), None)[1])
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        found = copy.deepcopy(model)(x)
        close([found], [te.set_fast(copy.deepcopy(model), False)(x)])


class Mark(torch.autograd.Function):
    """A node that holds something as long as the graph is there."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("asked", ["nothing", "head", "gate"])
def test_passes_that_end_early_leave_nothing(asked):
    """A circle of nodes and what they keep would never be freed."""
    model = te.inject(timm.create_model("res2net50_26w_4s", num_classes=3), "tea", 2).train()
    held = nn.Identity()  # anything
    alive = weakref.ref(held)
    model.conv1.register_forward_hook(lambda _, __, output, held=[held]: Mark.apply(output, held.pop()))
    del held
    y = model(torch.randn(2, 3, 64, 64))
    gate = next(m for m in model.modules() if isinstance(m, MotionExcitation))
    weight = {"nothing": None, "head": model.fc.weight, "gate": gate.norm2.weight}[asked]
    assert alive() is not None
    if weight is not None:
        torch.autograd.grad(y.sum(), weight)
    del y
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("placement", ["loc1", "loc2", "loc4"])
@pytest.mark.parametrize("module", ["tsm", "shift", "action", "tea_me"])
def test_nothing_is_kept_after_the_backward_pass(module, placement):
    """Also while the loss is still there, as in a loop until the next step's takes its name."""

    def kept():
        gc.collect()
        return [found for found in gc.get_objects() if type(found) is Recomputable]

    model, before = network(module, placement=placement), len(kept())
    loss = model(torch.randn(8, 3, 6, 5, dtype=torch.float64)).square().sum()
    loss.backward()
    assert len(kept()) == before
    del loss


def test_a_norm_with_a_method_of_its_own():
    x, found = torch.randn(8, 3, 6, 5, dtype=torch.float64), []
    for fast in (True, False):
        model = te.set_fast(network(placement="loc4"), fast)
        for block in model[1:]:
            block.norm.forward = lambda x, norm=block.norm: 2 * nn.BatchNorm2d.forward(norm, x)
        found.append(gradients(model, x))
    close(*found)


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("paths", [("me",), ("ce", "me"), ("ste", "ce", "me")])
def test_what_stands_for_the_norm_may_change_its_input(paths, t):
    module = te.ActionModule(8, t, 2, paths=paths).double()
    module.me.norm = nn.ReLU(inplace=True)
    plain = te.set_fast(copy.deepcopy(module), False)
    x = torch.randn(t, 8, 6, 5, dtype=torch.float64)
    close(gradients(module, x), gradients(plain, x))


def test_frozen_a_single_frame_keeps_its_strides():
    module = te.ActionModule(8, 1, 2, paths=("me",), norm=False).requires_grad_(False)
    x = torch.randn(1, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    assert module(x).stride() == x.stride()


def test_modules_sharded_by_themselves(tmp_path):
    """FSDP has a module's weights back for its own backward pass, after the next layer's."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
        model = network().eval()
        expected = gradients(te.set_fast(copy.deepcopy(model), False), x)
        mesh = distributed.init_device_mesh("cpu", (1,))
        for site in te.sites(model):
            fully_shard(site.module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(x).square().sum().backward()
        found = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
        close(found, expected[1 : 1 + len(found)])
    finally:
        distributed.destroy_process_group()

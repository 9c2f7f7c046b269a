"""Modules and networks under ``torch.func``, vmap and forward-mode differentiation: what calls by themselves
and ordinary backward passes give."""

import copy

import pytest
import test_causal
import test_tea
import torch
from test_modules import randomise
from torch import func, nn
from torch.autograd import forward_ad

import temporal_excite as te

T = 3


def module(name: str, causal: bool, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomise(test_causal.BUILD[name](4, T, causal=causal).double()).train(training)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = test_tea.RES2NET if name in ("tea", "2plus1d_me") else test_tea.RESNET
    model = te.inject(test_tea.network(block, (1, 1, 1, 1)), name, T, **NETWORKS[name]).double()
    for site in te.sites(model):
        randomise(site.module)
    return model.train()


CASES = {
    f"{name}{', causal' * causal}{', train' * training}": (module, name, causal, training)
    for name in test_causal.BUILD
    for causal in (False, True)
    for training in (False, True)
    if not training or name in test_causal.STATISTICS
}
NETWORKS = {"action": {}, "tea": {}, "2plus1d_me": {}, "tefe": {"te": (1, 0, 1, 0), "fe": (0, 1, 0, 1)}}
CASES |= {f"network {name}": (network, name) for name in NETWORKS}


@pytest.fixture(params=CASES)
def model(request) -> nn.Module:
    build, *args = CASES[request.param]
    return build(*args)


def clips_for(model: nn.Module) -> torch.Tensor:
    """Two batches of two clips."""
    channels = getattr(model, "channels", 3)
    size = 5 if isinstance(model, te.modules.TemporalModule) else 32
    return torch.randn(2, 2 * T, channels, size, size - 1, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected.detach()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * max(1.0, float(expected.abs().max())))


def as_function(model: nn.Module):
    """``f(parameters, x)``, which leaves the norms' statistics alone."""
    buffers = dict(model.named_buffers())

    def f(parameters, x):
        own = {k: v.clone() for k, v in buffers.items()}
        return func.functional_call(model, (parameters, own), (x,))

    return f, {k: v.detach() for k, v in model.named_parameters()}


def test_gradients(model):
    x = clips_for(model)[0]
    f, parameters = as_function(model)
    found, found_x = func.grad(lambda p, x: f(p, x).square().sum(), argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip([found_x, *found.values()], expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("way", ["torch.func", "dual tensors"])
def test_derivative_in_a_direction(model, way):
    """``<u, J v> = <J^T u, v>``, the right side from a backward pass."""
    x, v = clips_for(model)
    f, parameters = as_function(model)
    directions = {k: torch.randn_like(p) for k, p in parameters.items()}
    if way == "torch.func":
        y, found = func.jvp(f, (parameters, x), (directions, v))
    else:
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(p, directions[k]) for k, p in parameters.items()}
            y, found = forward_ad.unpack_dual(f(duals, forward_ad.make_dual(x, v)))
    x.requires_grad_()
    u = torch.randn_like(y)
    back = torch.autograd.grad(model(x), [x, *model.parameters()], u)
    expected = sum((a * b).sum() for a, b in zip(back, [v, *directions.values()], strict=True))
    close((u * found).sum(), expected)


def test_many_batches_at_a_time(model):
    model.eval()
    batches = clips_for(model)
    with torch.no_grad():
        close(func.vmap(model)(batches), torch.stack([model(x) for x in batches]))
    f, parameters = as_function(model)
    loss = func.grad(lambda p, x: f(p, x).square().sum())
    each = [loss(parameters, x) for x in batches]
    for name, found in func.vmap(loss, (None, 0))(parameters, batches).items():
        close(found, torch.stack([grads[name] for grads in each]))


def test_many_gradients_at_a_time(model):
    """A graph made as ever, and several backward passes through it at once."""
    x = clips_for(model)[0].requires_grad_()
    inputs = [x, *model.parameters()]
    y = model(x)
    vectors = torch.randn(3, *y.shape, dtype=y.dtype)

    def backward(v):
        return torch.autograd.grad(y, inputs, v, retain_graph=True)

    each = [backward(v) for v in vectors]
    for i, found in enumerate(func.vmap(backward)(vectors)):
        close(found, torch.stack([grads[i] for grads in each]))


def test_an_ensemble():
    models = [network("action").eval() for _ in range(2)]
    randomise(te.sites(models[1])[0].module)
    parameters, buffers = func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = clips_for(models[0])[0]
    found = func.vmap(lambda p, b: func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    close(found, torch.stack([m(x) for m in models]))

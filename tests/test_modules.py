"""STE, CE, ME, ACTION and the shifts against their plain references, and their common contract."""

import copy
import itertools

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from temporal_excite import CE, ME, STE, ActionModule, TemporalConv, TemporalShift

PATHS = [p for n in (1, 2, 3) for p in itertools.combinations(("ste", "ce", "me"), n)]
BUILD = {
    "ste": lambda c, t: STE(c, t),
    "ce": lambda c, t: CE(c, t),
    "ce without relu": lambda c, t: CE(c, t, relu=False),
    "me": lambda c, t: ME(c, t),
    "me without norm": lambda c, t: ME(c, t, norm=False),
    "action": lambda c, t: ActionModule(c, t),
    "action without shift": lambda c, t: ActionModule(c, t, shift=False),
    "action identity start": lambda c, t: ActionModule(c, t, identity_start=True),
    **{"action " + "+".join(p): lambda c, t, p=p: ActionModule(c, t, paths=p, reduction=4) for p in PATHS},
    "conv": lambda c, t: TemporalConv(c, t),
    "conv random": lambda c, t: TemporalConv(c, t, init="random"),
    "tsm": lambda c, t: TemporalShift(c, t, shift_div=4),
}
shapes = st.tuples(*(st.integers(1, top) for top in (3, 5, 20, 5, 5)))  # N, T, C, H, W


def gate_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The reference's gate for an STE, CE or ME."""
    t = module.n_segment
    if isinstance(module, STE):
        return reference.ste_gate(x, module.weight, t, reference.first_tap(module))
    if isinstance(module, CE):
        relu = isinstance(module.act, nn.ReLU)
        weights = (module.squeeze.weight, module.temporal.weight, module.expand.weight)
        return reference.ce_gate(x, *weights, t, relu, reference.first_tap(module))
    assert isinstance(module, ME)
    weights = (module.squeeze.weight, module.norm, module.transform.weight, module.expand.weight)
    return reference.me_gate(x, *weights, t, module.causal)


def plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the equations give for a module."""
    if isinstance(module, TemporalShift):
        if module.causal:
            return reference.causal_shift(x, module.channels // 4, module.n_segment)
        return reference.part_shift(x, module.channels // 4, module.n_segment)
    if isinstance(module, TemporalConv):
        return reference.temporal_conv(x, module.weight, module.n_segment, reference.first_tap(module))
    if isinstance(module, ActionModule):
        y = x
        if isinstance(module.shift, TemporalConv):
            first = reference.first_tap(module)
            y = reference.temporal_conv(x, module.shift.weight, module.n_segment, first)
        gates = [gate_of(getattr(module, path), y) for path in module.paths]
        if module.identity_start:
            return sum(y + y * (2 * gate - 1) for gate in gates) / len(gates)
        return sum(y + y * gate for gate in gates)
    return x + x * gate_of(module, x)


def randomise(module: nn.Module) -> nn.Module:
    """Random weights and batch-norm statistics, so that nothing is hidden by a zero or a one."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of y."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_equals_reference(name, training, shape, seed):
    n, t, c, h, w = shape
    # batch norm needs more than one value, and two differ by rounding alone where their variance vanishes
    assume(not training or n * t * h * w > 2)
    torch.manual_seed(seed)
    module = randomise(BUILD[name](c, t).double()).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(n * t, c, h, w, dtype=torch.float64, requires_grad=True)

    y, expected = module(x), plain(twin, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    got = gradients(y, [x, *module.parameters()])
    want = gradients(expected, [x, *twin.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["ste", "ce without relu", "me", "action ste+me", "conv random", "tsm"])
def test_gradcheck(name, training):
    torch.manual_seed(0)
    module = randomise(BUILD[name](5, 2).double()).train(training)
    x = torch.randn(4, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_running_statistics_move_once_a_step():
    module = ActionModule(8, 4).train()
    x = torch.randn(8, 8, 5, 5)
    squeezed = module.me.squeeze(reference.temporal_conv(x, module.shift.weight, 4)).detach()
    module(x).sum().backward()
    norm = module.me.norm
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean[0], 0.1 * squeezed.mean())
    torch.testing.assert_close(norm.running_var[0], 0.9 + 0.1 * squeezed.var())


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_layouts_agree_and_are_kept(name, layout):
    torch.manual_seed(0)
    module = randomise(BUILD[name](12, 3)).eval()
    x = torch.randn(6, 12, 7, 5)
    other = {
        "contiguous": x.clone(),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": torch.stack([x, x], dim=-1)[..., 0],
    }[layout]
    y = module(other)
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-4)
    assert y.shape == x.shape and y.dtype == x.dtype
    if layout != "sliced":
        assert y.stride() == other.stride()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(name, dtype, training):
    torch.manual_seed(0)
    module = BUILD[name](16, 4).train(training)
    x = torch.randn(8, 16, 6, 6)
    expected = copy.deepcopy(module)(x)
    for x_dtype in (torch.float32, dtype):
        twin = copy.deepcopy(module)
        with torch.autocast("cpu", dtype=dtype):
            y = twin(x.to(x_dtype))
        assert y.dtype == x_dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        if list(twin.parameters()):
            y.float().sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in twin.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", BUILD)
def test_half_precision_weights(name):
    torch.manual_seed(0)
    module = BUILD[name](16, 4).eval()
    x = torch.randn(8, 16, 6, 6)
    y = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", BUILD)
def test_no_parameter_has_five_dimensions(name):
    module = BUILD[name](16, 4)
    assert all(p.ndim <= 4 for p in module.parameters())
    module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BUILD)
def test_input_is_left_alone(name):
    module = BUILD[name](16, 4).eval()
    x = torch.randn(8, 16, 3, 3)
    before = x.clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", BUILD)
def test_clips_do_not_mix(name):
    module = randomise(BUILD[name](16, 4)).eval()
    x = torch.randn(8, 16, 3, 3)
    torch.testing.assert_close(module(x)[4:], module(x[4:]))


@pytest.mark.parametrize("cls", [STE, CE, ME, ActionModule])
def test_identity_start_is_exact_and_learns(cls):
    torch.manual_seed(0)
    module = cls(24, 4, identity_start=True)
    x = torch.randn(8, 24, 5, 5, requires_grad=True)
    for training in (True, False):
        assert torch.equal(module.train(training)(x), x)
    zeros = [p for p in module.parameters() if not p.any()]
    grads = torch.autograd.grad(module(x).pow(2).sum(), zeros, allow_unused=True)
    assert zeros and any(g is not None and g.any() for g in grads)


def test_learnable_shift_starts_as_tsm():
    x = torch.randn(10, 19, 3, 2)
    torch.testing.assert_close(TemporalConv(19, 5)(x), TemporalShift(19, 5)(x), rtol=0, atol=0)
    torch.testing.assert_close(TemporalConv(19, 5, init="identity")(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17])
def test_small_channel_counts(channels):
    module = ActionModule(channels, 2)
    assert module.ce.squeeze.out_channels == max(1, channels // 16)
    module(torch.randn(4, channels, 1, 1))


def test_parameter_names_are_stable():
    assert set(ActionModule(16).state_dict()) == {
        "shift.weight",
        "ste.weight",
        "ce.squeeze.weight",
        "ce.temporal.weight",
        "ce.expand.weight",
        "me.squeeze.weight",
        *(f"me.norm.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "me.transform.weight",
        "me.expand.weight",
    }
    assert set(ActionModule(16, paths=["ce"], shift=False).state_dict()) == {
        f"ce.{k}.weight" for k in ("squeeze", "temporal", "expand")
    }


BAD = [
    (lambda: ActionModule(0), ValueError, "channels must be at least 1, got 0"),
    (lambda: ActionModule(2.0), TypeError, "channels must be an int, got 2.0"),
    (lambda: ActionModule(8, 0), ValueError, "n_segment must be at least 1, got 0"),
    (lambda: ActionModule(8, -3), ValueError, "n_segment must be at least 1, got -3"),
    (lambda: ActionModule(8, True), TypeError, "n_segment must be an int, got True"),
    (lambda: ActionModule(8, reduction=0), ValueError, "reduction must be at least 1, got 0"),
    (lambda: ActionModule(8, shift_div=1), ValueError, "shift_div must be at least 2"),
    (lambda: ActionModule(8, paths=()), ValueError, r"paths must be .* got \(\)"),
    (lambda: ActionModule(8, paths=5), ValueError, r"paths must be .* got 5"),
    (lambda: ActionModule(8)(torch.zeros(8, 8, 3, 3, dtype=torch.int64)), TypeError, r"int64.*x\.float\(\)"),
    (lambda: ActionModule(8, paths=("ste", "se")), ValueError, "'se'"),
    (lambda: ActionModule(8, paths=("ste", "ste")), ValueError, "distinct"),
    (lambda: ActionModule(8, paths="ste"), ValueError, "got 'ste'"),
    (lambda: TemporalConv(8, init="zero"), ValueError, "got 'zero'"),
    (lambda: TemporalShift(8, shift_div=0), ValueError, "shift_div must be at least 1, got 0"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(
    "shape, message",
    [
        ((7, 8, 3, 3), "7 frames are not a multiple of n_segment=4.*set_n_segment"),
        ((8, 8, 3), r"3-D input \(8, 8, 3\)"),
        ((2, 4, 8, 3, 3), r"5-D input \(2, 4, 8, 3, 3\).*flatten"),
        ((8, 6, 3, 3), r"8 channels got input \(8, 6, 3, 3\)"),
    ],
)
def test_bad_input(name, shape, message):
    with pytest.raises(ValueError, match=message):
        BUILD[name](8, 4)(torch.zeros(shape))

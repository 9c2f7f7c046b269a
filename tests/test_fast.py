"""The fast forms give what the published forms give, step by step: outputs, gradients, running statistics."""

import copy
from unittest.mock import patch

import pytest
import reference
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modules import randomise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import temporal_excite as te
from temporal_excite import ops, passes
from temporal_excite.modules.tea import MotionExcitation
from temporal_excite.ops import coefficients, nine_means, nine_parts

MODULES = {
    "action": te.ActionModule,
    "text": lambda c, t: te.ActionModule(c, t, shift=False, relu=False),
    "centred": lambda c, t: te.ActionModule(c, t, identity_start=True),
    "ce+me": lambda c, t: te.ActionModule(c, t, paths=("ce", "me")),
    "ste": te.STE,
    "ce": te.CE,
    "me": te.ME,
    "tsm": te.TemporalShift,
    "shift": te.TemporalConv,
}


def build(name, channels, n_segment, dtype=torch.float64):
    """A module with nothing at a special value."""
    return randomise(MODULES[name](channels, n_segment)).to(dtype)


def frames(shape, layout, dtype=torch.float64):
    n, c, h, w = shape
    if layout == "sliced":
        return torch.randn(n, c + 2, h, w, dtype=dtype)[:, 1:-1]
    x = torch.randn(shape, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def results(module, x, weight, fast):
    """Output, gradients and buffers of a copy of the module."""
    module = te.set_fast(copy.deepcopy(module), fast)
    x = x.detach().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], weight)
    found = [out.detach(), *grads, *(b.double() for b in module.buffers())]
    if not module.training:
        with torch.no_grad():
            found.append(module(x))
    return found


def relative(a, b):
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=20, deadline=None)
@given(
    channels=st.integers(1, 36),
    n_segment=st.integers(1, 5),
    clips=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    mode=st.sampled_from(["train", "eval", "frozen norm"]),
    seed=st.integers(0, 99),
)
def test_equals_the_published_form(name, channels, n_segment, clips, height, width, layout, mode, seed):
    torch.manual_seed(seed)
    module = build(name, channels, n_segment).train(mode != "eval")
    if mode == "frozen norm":
        for m in module.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.eval()
    # batch norm over one value raises, and over few its gradient is the small rest of large terms
    if mode == "train" and clips * n_segment * height * width < 8:
        height += 8
    x = frames((clips * n_segment, channels, height, width), layout)
    weight = torch.randn(x.shape, dtype=x.dtype)
    before = [p.detach().clone() for p in module.parameters()]
    fast, plain = (results(module, x, weight, f) for f in (True, False))
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).norm() <= 1e-12 * max(float(b.norm()), float(plain[1].norm()) * 1e-2)
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 5, 36, 14, 14))),
    paths=st.sets(st.sampled_from(["ste", "ce", "me"]), min_size=1),
    options=st.fixed_dictionaries({k: st.booleans() for k in ("causal", "identity_start", "relu", "norm")}),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_float32_equals_the_published_form(shape, paths, options, layout, small, seed):
    """Without gradients float32 takes ways of its own, and large frames are cut into parts."""
    torch.manual_seed(seed)
    clips, n_segment, channels, height, width = shape
    module = randomise(te.ActionModule(channels, n_segment, paths=tuple(paths), **options)).eval()
    x = frames((clips * n_segment, channels, height, width), layout, torch.float32)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        exact = te.set_fast(copy.deepcopy(module).double(), False)(x.double())
        with (
            patch.object(passes, "_FRESH", 0),
            patch.object(passes, "_PART", height * width * 20 if small else passes._PART),
            patch.object(ops, "_ROWS", 40 if small else ops._ROWS),
        ):
            found = module(x)
    assert (found - exact).norm() < 2e-6 * max(exact.norm(), x.norm())
    assert not found._is_view()
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("paths", [("ste",), ("ce",), ("ste", "ce", "me")])
def test_the_shift_is_not_stored_where_nothing_needs_it(paths, monkeypatch):
    monkeypatch.setattr(passes, "_FRESH", 0)
    module, x = te.ActionModule(16, 4, paths=paths).eval(), torch.randn(8, 16, 9, 8)
    if not ops.has_fast_rows(x):
        pytest.skip("float32 is not fast by rows here")
    forward = te.TemporalConv.forward
    watched = patch.object(te.TemporalConv, "forward", autospec=True, side_effect=forward)
    with torch.no_grad(), watched as shift:
        expected = te.set_fast(module, False)(x)
        assert shift.call_count == 1
        torch.testing.assert_close(te.set_fast(module, True)(x), expected)
        assert shift.call_count == 1
        module.shift.register_forward_hook(lambda layer, args, y: y * 2)  # which asks for the shift's output
        torch.testing.assert_close(module(x), te.set_fast(module, False)(x))
        assert shift.call_count == 3


def full_shift(module):
    module.shift = te.TemporalConv(16, 4, init="random", depthwise=False)


def doubled_shift(module):
    shift = module.shift.forward
    module.shift.forward = lambda x: 2 * shift(x)


def doubled_gate(module):
    gate = module.ste.gate
    module.ste.gate = lambda x: 2 * gate(x)


@pytest.mark.parametrize("change", [full_shift, doubled_shift, doubled_gate])
def test_parts_of_action_that_a_user_changes(change, monkeypatch):
    monkeypatch.setattr(passes, "_FRESH", 0)
    module, x = te.ActionModule(16, 4).eval(), torch.randn(8, 16, 9, 8)
    change(module)
    with torch.no_grad():
        found = module(x)
        torch.testing.assert_close(found, te.set_fast(module, False)(x))


def test_a_shift_of_other_frames_is_an_error(monkeypatch):
    monkeypatch.setattr(passes, "_FRESH", 0)
    module = te.ActionModule(16, 4).eval()
    module.shift = te.TemporalConv(16, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="n_segment=3"):
        module(torch.randn(8, 16, 9, 8))


def test_tables_are_not_those_of_a_fake_run(monkeypatch):
    monkeypatch.setattr(passes, "_FRESH", 0)
    module, x = te.ActionModule(16, 4).eval(), torch.randn(8, 16, 17, 19)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(x)
        torch.testing.assert_close(module(x), te.set_fast(module, False)(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nine_means_of_large_maps_round_little(layout):
    """Neighbouring frames' are subtracted."""
    x = frames((2, 8, 300, 300), layout, torch.float32).mul_(1e-3).add_(1)
    means = torch.stack([part.double().mean((2, 3)) for part in nine_parts(x)])
    assert (nine_means(x) - means).abs().max() < 5e-6


@pytest.mark.parametrize("kind", [te.ME, MotionExcitation])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_float32_in_training(kind, layout):
    """Those of the squeeze are a small rest of large sums."""
    torch.manual_seed(1)
    module = kind(32, 8).train()
    x = frames((32, 32, 28, 28), layout, torch.float32).relu()
    weight = torch.randn_like(x)
    exact = te.set_fast(copy.deepcopy(module).double(), False)
    expected = torch.autograd.grad(exact(x.double()), exact.squeeze.weight, weight.double())[0]
    found = torch.autograd.grad(module(x), module.squeeze.weight, weight)[0]
    assert relative(found.double(), expected) < 2e-4


def test_large_maps_are_cut_into_blocks():
    torch.manual_seed(0)
    for layout in ("contiguous", "channels_last"):
        module = build("action", 40, 4).eval()
        x = frames((8, 40, 64, 61), layout)
        weight = torch.randn(x.shape, dtype=x.dtype)
        for a, b in zip(*(results(module, x, weight, f) for f in (True, False)), strict=True):
            assert relative(a, b) < 1e-12


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 1), (2, 2), (4, 7)])
def test_nine_means_tell_the_mean_of_a_convolution(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    kernel = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, kernel, padding=1, groups=3).mean((-2, -1))
    found = (coefficients(kernel, height, width)[:, None] * nine_means(x)).sum(0)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [200, ops._ROWS])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (50, 1), (1, 80), (80, 1), (4, 7), (33, 32)])
def test_nine_means_are_those_of_their_parts(height, width, layout, many, rows, monkeypatch):
    monkeypatch.setattr(ops, "_ROWS", rows)
    channels = (1 << 20) // (9 * height * width) + 1 if many else 3
    x = frames((9, channels, height, width), layout, torch.float32)
    means = torch.stack([part.double().mean((2, 3)) for part in nine_parts(x)])
    torch.testing.assert_close(nine_means(x).double(), means, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 6, 7, 5, 5))),
    layout=st.sampled_from(["contiguous", "sliced", "channels_last"]),
    causal=st.booleans(),
    large=st.booleans(),
    part=st.sampled_from([1, 200, 1000]),
    seed=st.integers(0, 99),
)
def test_temporal_convolution_of_small_whole_numbers(shape, layout, causal, large, part, seed):
    """Nothing is rounded in float32, which takes ways of its own; large results take others."""
    fresh = 0 if large else passes._FRESH
    with patch.object(passes, "_FRESH", fresh), patch.object(passes, "_PART", part):
        check_whole_numbers(shape, layout, causal, seed)


def check_whole_numbers(shape, layout, causal, seed):
    torch.manual_seed(seed)
    clips, n_segment, channels, height, width = shape
    x = frames((clips * n_segment, channels, height, width), layout, torch.float32)
    x.copy_(torch.randint(-9, 9, x.shape))
    weight = torch.randint(-9, 9, (channels, 1, 3)).float()
    bad = n_segment - 1
    for value in (1.0, torch.nan):  # of one frame, which only those beside it meet
        x[bad, 0, 0, 0] = value
        exact = reference.temporal_conv(x.double(), weight.double(), n_segment, -2 if causal else -1)
        with torch.inference_mode():
            found = passes.temporal_conv(x, weight, n_segment, causal)
            check_gated(passes.row_conv(x, weight, n_segment, causal), exact)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=0, equal_nan=True)
    x[bad, 0, 0, 0] = 1
    upstream = torch.randint(-9, 9, x.shape).float()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    grads = torch.autograd.grad(passes.temporal_conv(*leaves, n_segment, causal), leaves, upstream)
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = reference.temporal_conv(*leaves, n_segment, -2 if causal else -1)
    for found, exact in zip(grads, torch.autograd.grad(y, leaves, upstream.double()), strict=True):
        assert torch.equal(found.double(), exact)


def check_gated(conv, y):
    """What a convolution by rows gives without being stored, where it has that form."""
    if conv is None:
        return
    n, channels, height, width = y.shape
    gates = [torch.randint(-9, 9, s).float() for s in ((n, channels, 1, 1), (n, 1, height, width))]
    for some in (gates[:1], gates[1:], gates):
        found = conv.result(*some).double()
        torch.testing.assert_close(found, y * sum(some), rtol=0, atol=0, equal_nan=True)
    mean = y.mean(1, keepdim=True)
    torch.testing.assert_close(conv.channel_mean().double(), mean, rtol=1e-6, atol=1e-6, equal_nan=True)
    means = conv.of_means(nine_means(conv.x)).double()
    of_parts = torch.stack([part.mean((2, 3)) for part in nine_parts(y)])
    known = of_parts[0].isfinite()  # a NaN is in the mean over everything, and may be in the others
    torch.testing.assert_close(means[:, known], of_parts[:, known], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (3, 16, 1, 1), (6, 1, 2, 2), (12, 24, 9, 8)])
def test_temporal_convolution_in_channels_last(shape, causal):
    x, weight = frames(shape, "channels_last", torch.float32), torch.randn(shape[1], 1, 3)
    found = passes.temporal_conv(x, weight, 3, causal)
    exact = passes.temporal_conv(x.double().contiguous(), weight.double(), 3, causal)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(passes.temporal_conv(x, weight, 3, causal), found)


@pytest.mark.parametrize("block", [1, passes._BLOCK])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_segment", [1, 2, 6])
def test_gradients_of_temporal_convolution_in_channels_last(n_segment, causal, block, monkeypatch):
    monkeypatch.setattr(passes, "_BLOCK", block)
    x, weight = frames((12, 5, 4, 3), "contiguous"), torch.randn(5, 1, 3, dtype=torch.float64)
    upstream, found = torch.randn_like(x), []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [x.clone(memory_format=layout).requires_grad_(), weight.clone().requires_grad_()]
        y = passes.temporal_conv(*leaves, n_segment, causal)
        first = torch.autograd.grad(y, leaves, upstream, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[1].square().sum(), leaves, allow_unused=True)])
    for contiguous, last in zip(*found, strict=True):
        assert contiguous is last is None or relative(last, contiguous) < 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("block", [1, 5 * 4 * 3 * 8 * 5, passes._BLOCK])  # one frame, five, all
@pytest.mark.parametrize(("n", "threads"), [(1, 3), (7, 2), (9, 3), (12, 8)])
def test_gate_in_blocks_of_every_threads_frames(n, threads, block, layout, monkeypatch):
    monkeypatch.setattr(passes, "_BLOCK", block)
    torch.set_num_threads(threads)
    tensors = [frames((n, 5, 4, 3), layout), frames((n, 5, 1, 1), "contiguous")]
    leaves = [t.requires_grad_() for t in (*tensors, frames((n, 1, 4, 3), "contiguous"))]
    y, *gates = leaves
    expected = y * (gates[0] + gates[1])
    grads = torch.autograd.grad(expected, leaves, expected)
    found = passes.gate(y, *gates)
    for a, b in zip(torch.autograd.grad(found, leaves, expected), grads, strict=True):
        assert relative(a, b) < 1e-14
    with torch.no_grad():
        assert torch.equal(passes.gate(y, *gates), expected)
        assert torch.equal(passes.gate(y.clone(), *gates, reuse=True), expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["action", "ste", "ce", "me"])
def test_half_precision_errs_no_more_than_the_published_form(name, dtype):
    torch.manual_seed(0)
    errors = {True: 0.0, False: 0.0}
    for _ in range(5):
        module = build(name, 32, 4).eval().to(dtype)
        x = frames((8, 32, 9, 8), "contiguous", dtype)
        with torch.no_grad():
            exact = te.set_fast(copy.deepcopy(module).double(), False)(x.double())
            for fast in errors:
                out = te.set_fast(module, fast)(x)
                assert out.dtype == dtype
                errors[fast] += relative(out.double(), exact)
    assert errors[True] <= 1.5 * errors[False]


def test_pooled_sums_do_not_overflow():
    module = build("action", 16, 4).half().eval()
    x = torch.full((4, 16, 16, 16), 2000.0, dtype=torch.float16)  # sums to 512000 a channel
    with torch.no_grad():
        assert module.me.motion(x).isfinite().all()
        assert module.ce.gate(x).isfinite().all()
        assert module.ste.gate(x).isfinite().all()


def test_nothing_goes_stale():
    torch.manual_seed(0)
    module = build("action", 16, 2).eval()
    x = frames((4, 16, 5, 5), "contiguous")
    first = module(x)
    with torch.no_grad():
        module.me.norm.running_var.mul_(4)
        module.shift.weight.mul_(1.5)
        module.me.squeeze.weight.mul_(2)
    assert relative(module(x), first) > 1e-3
    assert relative(module(x), te.set_fast(copy.deepcopy(module), False)(x)) < 1e-12
    module.train()
    assert relative(module(x), te.set_fast(copy.deepcopy(module), False)(x)) < 1e-12


def test_running_statistics_move_once_a_step():
    module = build("action", 16, 2).train()
    out = module(frames((4, 16, 5, 5), "contiguous").requires_grad_())
    after_forward = copy.deepcopy(module.me.norm.state_dict())
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert int(module.me.norm.num_batches_tracked) == 1
    for key, value in module.me.norm.state_dict().items():
        assert torch.equal(value, after_forward[key])


@pytest.mark.parametrize("name", ["action", "ste", "ce"])
def test_second_derivatives(name):
    torch.manual_seed(0)
    module = build(name, 4, 2).eval()
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def motion_module(name):
    return MotionExcitation(8, 2) if name == "tea_me" else build(name, 8, 2, torch.float32)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["action", "me", "tea_me"])
def test_traces_and_programs_take_other_sizes(name):
    module = motion_module(name).eval()
    x, other = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 9, 4)
    height, width = (torch.export.Dim(side, min=2, max=64) for side in ("height", "width"))
    program = torch.export.export(module, (x,), dynamic_shapes=({2: height, 3: width},)).module()
    with torch.no_grad():
        for graph in (torch.jit.trace(module, x), program):
            torch.testing.assert_close(graph(other), module(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["action", "tea_me"])
def test_make_fx(name):
    module, x = motion_module(name).eval(), torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(make_fx(module)(x)(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["autocast", "autocast, backward inside", "converted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["action", "ste", "ce", "me", "shift"])
def test_gradients_in_lower_precision_err_no_more_than_the_published_form(name, dtype, way):
    """Also of a backward pass inside autocast, which is not meant to be, but common."""
    torch.manual_seed(0)
    converted, inside = way == "converted", "inside" in way
    kind, scale = (dtype, 1) if converted else (torch.float32, 200)
    errors = {True: torch.zeros(()), False: torch.zeros(())}
    for _ in range(6):
        module = build(name, 32, 4, torch.float32).train()
        x, weight = torch.randn(8, 32, 14, 14) + 1, torch.randn(8, 32, 14, 14) * scale
        exact = te.set_fast(copy.deepcopy(module).double(), False)
        (exact(x.double()) * weight.double()).sum().backward()
        for fast in errors:
            twin = te.set_fast(copy.deepcopy(module), fast).to(kind)
            with torch.autocast("cpu", dtype, enabled=not converted):
                loss = (twin(x.to(kind)) * weight).sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            pairs = zip(twin.parameters(), exact.parameters(), strict=True)
            errors[fast] = errors[fast] + torch.tensor([relative(p.grad.double(), q.grad) for p, q in pairs])
    assert (errors[True] <= 1.5 * errors[False] + 1e-5).all(), (errors[True] / errors[False]).tolist()


def test_another_default_device():
    module, x = te.TemporalConv(64, 8), torch.randn(8, 64, 72, 72)
    with torch.no_grad():
        expected = module(x)
        with torch.device("meta"):
            assert torch.equal(module(x), expected)


def test_constants_of_many_sizes_are_not_kept():
    module = build("me", 8, 1).eval()
    for height in range(1, 71):
        x = torch.randn(1, 8, height, 3, dtype=torch.float64, requires_grad=True)
        module(x).sum().backward()
    assert len(ops._constants) <= 64


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training):
    module = build("action", 16, 4, torch.float32).train(training)
    x = torch.randn(8, 16, 6, 5)
    expected = copy.deepcopy(module)(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    if not training:  # another graph
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_flops_of_the_fast_form():
    plain = te.count(timm.create_model("resnet50", num_classes=174), (8, 3, 224, 224)).flops
    model = te.inject(timm.create_model("resnet50", num_classes=174), "action")
    assert te.count(model, (8, 3, 224, 224)).flops / plain - 1 == pytest.approx(0.0545, abs=1e-4)
    assert te.count(model, (8, 3, 224, 224), fast=True).flops / plain - 1 <= 0.0090

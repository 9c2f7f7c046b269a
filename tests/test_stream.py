"""Streams: frame by frame what the causal network gives for whole clips; their state; bad input."""

import copy
import gc
import io
import threading

import pytest
import test_causal
import timm
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import temporal_excite as te


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def segments(resets: list[bool]) -> list[tuple[int, int]]:
    """Where the parts of a stream begin and end, that ``resets`` cut it into."""
    starts = [t for t, reset in enumerate(resets) if reset or t == 0]
    return list(zip(starts, [*starts[1:], len(resets)], strict=True))


def on_clip(model: nn.Module, clip: Tensor) -> Tensor:
    """The model on one clip of any length."""
    for module in model.modules():
        if hasattr(module, "n_segment"):
            module.n_segment = len(clip)
    return model(clip)


@torch.no_grad()
def check_equality(model: nn.Module, x: Tensor, resets: list[list[bool]], tolerance: float) -> None:
    """Step through streams ``(B, L, C, H, W)``, each reset where it is told, and compare with the clips.

    A network that answers one rounding of its input with more than a 30th of ``tolerance`` gets 30 times
    that: every layer rounds.
    """
    stream = te.Stream(model)
    state = stream.initial_state(len(x), x.shape[2:])
    outputs = []
    for t in range(x.shape[1]):
        if gone := [b for b in range(len(x)) if t and resets[b][t]]:
            state = stream.reset(state, gone)
        y, state = stream.step(x[:, t], state)
        outputs.append(y)
    got = torch.stack(outputs, 1)
    for b in range(len(x)):
        for start, end in segments(resets[b]):
            clip = x[b, start:end]
            want = on_clip(model, clip)
            rounded = clip * (1 + torch.finfo(clip.dtype).eps * torch.randn_like(clip).sign())
            allowed = max(tolerance, 30 * relative(on_clip(model, rounded), want))
            assert relative(got[b, start:end], want) < allowed
            seen = end - start
        assert relative(state["consensus"][b], want.mean(0)) < 10 * allowed
        assert int(state["frames"][b]) == seen


def with_dtype(module: nn.Module) -> nn.Module:
    """A module without parameters has no dtype, which a stream reads from its model."""
    if not list(module.parameters()):
        module.anything = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return module


streams = st.integers(1, 3).flatmap(
    lambda b: st.integers(1, 7).flatmap(
        lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)
    )
)


@pytest.mark.parametrize("name", test_causal.BUILD)
@settings(max_examples=8, deadline=None)
@given(resets=streams, shape=st.tuples(*[st.integers(1, n) for n in (12, 5, 5)]), fast=st.booleans())
def test_module_equals_clip(name, resets, shape, fast):
    channels, height, width = shape
    torch.manual_seed(channels)
    module = te.set_fast(with_dtype(test_causal.build(name, channels, 4)), fast)
    x = torch.randn(len(resets), len(resets[0]), module.channels, height, width, dtype=torch.float64)
    check_equality(module, x, resets, 1e-12)


@pytest.mark.parametrize("name", test_causal.BUILD)
def test_module_in_single_precision(name):
    torch.manual_seed(0)
    module = with_dtype(test_causal.build(name, 16, 4)).float()
    x = torch.randn(2, 5, module.channels, 5, 4)
    check_equality(module, x, [[False] * 5, [False, False, True, False, False]], 1e-5)


@pytest.mark.parametrize("name", test_causal.NETWORKS)
@settings(max_examples=2, deadline=None)
@given(resets=streams)
def test_networks_by_name(name, resets):
    model, x = test_causal.network(name)
    x = torch.randn(len(resets), len(resets[0]), *x.shape[1:], dtype=x.dtype)
    check_equality(model, x, resets, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, x = build(family, "action", causal=True, double=True)
    x = torch.stack([x[:3], x[1:]])
    check_equality(model, x, [[False, False, False], [False, False, True]], 1e-12)


# --- the state ---------------------------------------------------------------------------------------


def small(module="action", window=None, **kwargs) -> te.Stream:
    model, _ = build("resnet", module, causal=True, double=True)
    return te.Stream(model, window, **kwargs)


def frames(batch: int, length: int) -> Tensor:
    return torch.randn(
        length, batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("window", [None, 1, 3])
def test_consensus(window):
    stream, video = small("tsm", window), frames(2, 6)
    outputs = [stream(f) for f in video]
    for t in range(6):
        seen = torch.stack([o.logits for o in outputs[: t + 1]])
        mean = seen[-(window or len(seen)) :].mean(0)
        assert relative(outputs[t].consensus, mean) < 1e-13
    clips = te.VideoClassifier(stream.model, dropout=0)
    te.set_n_segment(stream.model, 6)
    if window is None:
        with torch.no_grad():
            assert relative(outputs[-1].consensus, clips(video.transpose(0, 1))) < 1e-12
    again = te.Stream(clips, window)
    assert torch.equal(again(video[0]).logits, outputs[0].logits)  # the classifier's network


def test_state_is_flat_and_no_call_changes_it():
    stream, video = small(window=2), frames(3, 4)
    state = stream.initial_state(3, (3, 32, 32))
    assert all(len(v) == 3 and not v.any() for v in state.values())
    assert state["frames"].dtype == torch.int64 and state["recent"].shape == (3, 2, 4)
    for f in video:
        before = {k: v.clone() for k, v in state.items()}
        _, after = stream.step(f, state)
        stream.reset(state, 1)
        assert after.keys() == state.keys()
        assert all(torch.equal(before[k], v) for k, v in state.items())
        state = after
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())


@pytest.mark.parametrize("index", [1, -1, [0, 2], slice(1, None), torch.tensor([True, False, True]), None])
def test_reset(index):
    stream, video = small(), frames(3, 3)
    state = stream.initial_state(3, (3, 32, 32))
    for f in video[:2]:
        _, state = stream.step(f, state)
    fresh = torch.zeros(3, dtype=torch.bool)
    fresh[slice(None) if index is None else index] = True
    got, _ = stream.step(video[2], stream.reset(state, index))
    kept, _ = stream.step(video[2], state)
    new, _ = stream.step(video[2], stream.initial_state(3, (3, 32, 32)))
    assert torch.equal(got, torch.where(fresh[:, None], new, kept))
    with pytest.raises(IndexError, match="3"):
        stream.reset(state, 3)


def test_own_state():
    stream, video = small(), frames(2, 3)
    first = [stream(f).logits for f in video]
    stream.reset(index=1)
    again = stream(video[0]).logits
    assert torch.equal(again[1], first[0][1]) and not torch.equal(again[0], first[0][0])
    stream.reset()
    assert all(torch.equal(stream(f).logits, want) for f, want in zip(video, first, strict=True))
    stream.reset()
    stream(frames(1, 1)[0][..., :16, :])  # another batch and another size


def test_streams_of_different_age_in_one_batch():
    """Saved, read back, moved, joined: rows of states are streams."""
    stream, video = small(window=2), frames(2, 5)
    shape = (3, 32, 32)
    a, b = stream.initial_state(1, shape), stream.initial_state(1, shape)
    want = []
    for t in range(5):
        ya, a_next = stream.step(video[t, :1], a)
        if t == 3:
            for f in video[:3, 1:]:
                _, b = stream.step(f, b)
            file = io.BytesIO()
            torch.save(a, file)
            file.seek(0)
            a = torch.load(file, weights_only=True)
            joined = {k: torch.cat([a[k], b[k]]) for k in a}
        if t >= 3:
            yb, b = stream.step(video[t, 1:], b)
            want.append(torch.cat([ya, yb]))
        a = a_next
    for t, y in zip((3, 4), want, strict=True):
        got, joined = stream.step(video[t], joined)
        assert relative(got, y) < 1e-12
    alone, _ = stream.step(video[0, :1], {k: v[1:] for k, v in joined.items()})
    both, _ = stream.step(video[0].flip(0), {k: v.flip(0) for k, v in joined.items()})
    assert relative(alone, both[:1]) > 1e-3  # another frame
    assert relative(both[1:], stream.step(video[0, :1], {k: v[:1] for k, v in joined.items()})[0]) < 1e-12


def test_ten_thousand_frames():
    """A video that repeats gives the same to the bit, a running mean stays one, and nothing grows."""
    torch.manual_seed(0)
    model = te.ActionModule(4, causal=True).eval()
    stream = te.Stream(model)
    video = torch.randn(5, 1, 4, 2, 2)
    state = stream.initial_state(1, (4, 2, 2))
    outputs: list[Tensor] = []
    for t in range(10_000):
        y, state = stream.step(video[t % 5], state)
        if t < 100:
            outputs.append(y)
        if t == 100:
            bytes_before = sum(v.untyped_storage().nbytes() for v in state.values())
            gc.collect()
            tensors = sum(type(o) is Tensor for o in gc.get_objects())
        if t in (200, 9_999):
            assert torch.equal(y, outputs[95 + t % 5])
    gc.collect()
    assert sum(type(o) is Tensor for o in gc.get_objects()) <= tensors
    assert sum(v.untyped_storage().nbytes() for v in state.values()) == bytes_before
    start = torch.stack(outputs[:10]).double()
    period = torch.stack(outputs[5:10]).double().mean(0)
    mean = (start.sum(0) + period * 9_990) / 10_000
    assert relative(state["consensus"].double(), mean) < 1e-5
    assert int(state["frames"]) == 10_000


def test_bytes_of_every_site():
    stream = small()
    table = te.sites(stream.model, frame_shape=(3, 32, 32))
    state = stream.initial_state(1, (3, 32, 32))
    for site in table:
        own = {k: v for k, v in state.items() if k.startswith(f"{site.layer}.temporal.")}
        assert site.state_bytes == sum(v.nbytes for v in own.values())
        c, r = site.channels, max(1, site.channels // 16)
        x = own[f"{site.layer}.temporal.shift.x.1"]
        h, w = x.shape[2:]
        assert x.shape == (1, c, h, w)
        # two past maps for the shift, two means for STE, two vectors for CE, one for ME
        assert site.state_bytes == 8 * (2 * c * h * w + 2 * h * w + 3 * r)
    kept = sum(s.state_bytes for s in table)
    assert stream.state_bytes((3, 32, 32)) == kept + 8 + 4 * 8  # the counter, the consensus
    assert str(table).endswith(f"{kept:,} bytes of state a stream")
    tsm = te.sites(small("tsm").model, frame_shape=(3, 32, 32))
    for site in tsm:  # one eighth of the channels, one frame
        assert site.state_bytes % (site.channels // 8 * 8) == 0
    assert "state bytes" not in str(te.sites(stream.model))
    with pytest.raises(ValueError, match="two-sided: it keeps no state"):
        te.sites(build("resnet")[0], frame_shape=(3, 32, 32))


# --- what surrounds a step ---------------------------------------------------------------------------


def run(stream: te.Stream, video: Tensor) -> Tensor:
    state = stream.initial_state(video.shape[1], video.shape[2:])
    outputs = []
    for f in video:
        y, state = stream.step(f, state)
        outputs.append(y)
    return torch.stack(outputs)


def test_several_streams_over_one_model():
    """Interleaved, copied, and in threads."""
    one, video = small(), frames(2, 6)
    other = te.Stream(one.model, window=2)
    want = run(one, video)
    backwards = run(one, video.flip(0))
    for t in range(6):
        assert torch.equal(one(video[t]).logits, want[t])
        assert torch.equal(other(video[-1 - t]).logits, backwards[t])
    twin = copy.deepcopy(one)
    for p in twin.model.parameters():
        nn.init.zeros_(p)
    assert torch.equal(run(one, video), want) and not run(twin, video).any()
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        results[i] = run(one, video if i % 2 else video.flip(0))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], want if i % 2 else backwards) for i in range(4))


def test_channels_last_autocast_and_inference_mode():
    stream, video = small(), frames(2, 4)
    want = run(stream, video)
    with torch.inference_mode():
        assert torch.equal(run(te.Stream(stream.model), video), want)
    stream.model.to(memory_format=torch.channels_last)
    flat = video.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 2))
    assert relative(run(te.Stream(stream.model), flat), want) < 1e-12
    model = stream.model.float()
    stream = te.Stream(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(stream, video.float())
        with torch.no_grad():
            clip = on_clip(model, video[:, 0].float())
    assert relative(half[:, 0].float(), clip.float()) < 0.05 and relative(half.double(), want) < 0.2
    half_model = te.Stream(copy.deepcopy(model).bfloat16())
    assert relative(run(half_model, video.bfloat16()).double(), want) < 0.3


@torch.no_grad()
def test_a_host_that_changes_what_a_module_saw():
    """In place, behind the module; and a caller who uses one buffer for all frames."""

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = te.TemporalConv(4, causal=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.shift(x)
            return y + x.relu_()

    torch.manual_seed(0)
    for model, name in ((Host().double(), "shift.x.1"), (te.TemporalConv(4, causal=True).double(), "x.1")):
        model.eval()
        x = torch.randn(5, 4, 2, 2, dtype=torch.float64)
        want = on_clip(model, x)
        stream, buffer = te.Stream(model), torch.empty_like(x[:1])
        for t in range(5):
            buffer.copy_(x[t : t + 1])
            assert relative(stream(buffer).logits, want[t : t + 1]) < 1e-14
        assert name in stream.module.copied


def test_frame_by_frame_without_temporal_modules():
    """TSN: the consensus is all there is."""
    model, _ = build("resnet", None, double=True)
    video = frames(2, 3)
    with torch.no_grad():
        assert relative(run(te.Stream(model), video)[1], model(video[1])) < 1e-14
    assert set(te.Stream(model).initial_state(1)) == {"frames", "consensus"}


# --- bad input ---------------------------------------------------------------------------------------


def test_bad_models():
    model, _ = build("resnet", "action", causal=True)
    both, _ = build("resnet", "shift")
    lone = nn.Sequential(nn.Conv2d(3, 4, 1), te.STE(4)).eval()

    class Plain(nn.Module):
        def __init__(self, channels, n_segment, causal=True):
            super().__init__()

        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="causal"):
        te.inject(timm.create_model("resnet10t"), Plain, causal=True)
    plain = te.inject(timm.create_model("resnet10t").eval(), Plain)
    cases = [
        ("resnet", {}, TypeError, "must be a torch.nn.Module, .*got str"),
        (torch.compile(model), {}, TypeError, r"stream\.module\.compile\(\)"),
        (model, {"window": 0}, ValueError, "window must be at least 1, got 0"),
        (model, {"window": 2.5}, TypeError, "window must be an int"),
        (both, {}, ValueError, r"TemporalConv at layer1\.0\.conv1 is two-sided: .*causal=True"),
        (lone, {}, ValueError, "STE '1' is two-sided"),
        (plain, {}, ValueError, "Plain at .*two-sided.* attribute causal = True"),
        (
            copy.deepcopy(model).train(),
            {},
            RuntimeError,
            "the ResNet is in training mode: call",
        ),
    ]
    for bad, kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            te.Stream(bad, **kwargs)
    stream = te.Stream(model)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        stream.initial_state(0)
    with pytest.raises(ValueError, match=r"frame_shape must be \(3, H, W\), got \(32, 32\)"):
        stream.initial_state(1, (32, 32))
    with pytest.raises(ValueError, match="Sequential has no default_cfg that tells"):
        te.Stream(nn.Sequential(te.STE(3, causal=True)).eval()).initial_state(1)
    with pytest.raises(RuntimeError, match=r"call the stream's initial_state\(\)"):
        te.Stream(model).module(torch.zeros(1, 3, 32, 32), {})
    with pytest.raises(TypeError, match="must give one tensor with a row a frame"):
        te.Stream(timm.create_model("resnet10t", features_only=True).eval()).initial_state(1, (3, 32, 32))


@pytest.mark.parametrize("causal", [False, True])
def test_modules_that_came_later(causal):
    model = timm.create_model("resnet10t", num_classes=3, channels=(16, 16, 32, 32)).eval()
    for injected in (False, True):
        if injected:
            te.inject(model, "shift", n_segment=4, causal=True)
        stream = te.Stream(model)
        state = stream.initial_state(2, (3, 32, 32))
        if injected:
            te.eject(model)
        te.inject(model, "tsm", n_segment=2, causal=causal)
        with pytest.raises(RuntimeError, match="make a new Stream after inject"):
            stream.step(torch.randn(2, 3, 32, 32), state)
        te.eject(model)


def test_what_is_no_state_or_index():
    stream = te.Stream(test_causal.network("tsm")[0])
    state, x = stream.initial_state(2, (3, 32, 32)), frames(2, 1)[0]
    for wrong in (None, [], "x", {**state, "frames": 3}):
        with pytest.raises(TypeError, match="a state is a dict of tensors"):
            stream.step(x, wrong)
    with pytest.raises(TypeError, match=r"a state is a dict of tensors, got 1; .* reset\(index=1\)"):
        stream.reset(1)
    with pytest.raises(TypeError, match="index must be a number"):
        stream.reset(state, True)


def test_bad_steps_leave_the_state_alone():
    stream, video = small(window=3), frames(2, 2)
    _, second = (stream(f).logits for f in video)
    stream.reset()
    stream(video[0])
    _, state = stream.step(video[0], stream.initial_state(2, (3, 32, 32)))
    other = te.Stream(small("shift").model, 3).initial_state(2, (3, 32, 32))
    wide = te.Stream(stream.model, 4).initial_state(2, (3, 32, 32))
    x = video[1]
    meta = {k: v.to("meta") for k, v in state.items()}
    cases = [
        (x[:1], state, r"frames \(1, 3, 32, 32\) need state.*batch and frame size stay"),
        (x[..., :16], state, r"frames \(2, 3, 32, 16\) need state.*initial_state\(2, \(3, 32, 16\)\)"),
        (x.float(), state, "frames are torch.float32, the model torch.float64"),
        (x.to(torch.uint8), state, "frames are torch.uint8"),
        (x[0], state, r"expected frames \(B, 3, H, W\), one of each stream, got \(3, 32, 32\)"),
        (x[:0], state, "expected frames"),
        ([x], state, "got list"),
        (x.to("meta"), state, "frames are on meta, the model is on cpu"),
        (x, {k: v.float() for k, v in state.items()}, "is torch.float32 on cpu, and needs to be torch"),
        (x, meta, "on meta, and needs to be torch.int64 on cpu"),
        (x, {k: v for k, v in state.items() if k != "frames"}, "missing: frames; unknown: nothing"),
        (x, other, "not a state of this model and window; missing: .* more; unknown: .*"),
        (x, wide, r"state\['recent'\] of shape \(2, 3, 4\), got \(2, 4, 4\)"),
        (x, {}, "missing: .*initial_state"),
    ]
    before = {k: v.clone() for k, v in state.items()}
    for bad, given_state, message in cases:
        with pytest.raises(ValueError, match=message):
            stream.step(bad, given_state)
    for bad in (x[:1], x[..., :16]):
        with pytest.raises(ValueError, match=r"began with frames \(2, 3, 32, 32\).*reset\(\) begins anew"):
            stream(bad)
    stream.model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        stream.step(x, state)
    stream.model.eval()
    assert all(torch.equal(before[k], v) for k, v in state.items())
    assert torch.equal(stream(x).logits, second)
    te.eject(stream.model)
    with pytest.raises(RuntimeError, match="make a new Stream after inject"):
        stream.step(x, state)


# --- graphs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["action", "te"])
@torch.no_grad()
def test_compile_and_export(name):
    model, _ = test_causal.network(name)
    stream, video = te.Stream(model, window=3), frames(2, 4)
    want = run(stream, video)
    state = stream.initial_state(2, (3, 32, 32))
    program = torch.export.export(stream.module, (video[0], state)).module()
    graph = copy.deepcopy(state)
    for f, y in zip(video, want, strict=True):
        got, graph = program(f, graph)
        assert relative(got, y) < 1e-12
    torch.compiler.reset()
    stream.module.compile(fullgraph=True, backend="aot_eager")
    assert relative(run(stream, video), want) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["action", "te"])
@torch.no_grad()
def test_onnx(name, tmp_path):
    """Fifty frames in ONNX Runtime, the state going from outputs to inputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _ = test_causal.network(name)
    stream = te.Stream(model.float(), window=8)
    state = stream.initial_state(1, (3, 32, 32))
    inputs = ["image", *state]
    torch.onnx.export(
        stream.module,
        (torch.zeros(1, 3, 32, 32),),
        tmp_path / "step.onnx",
        kwargs={"state": state},
        input_names=inputs,
        output_names=["logits", *(f"next.{key}" for key in state)],
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == inputs
    theirs = {key: value.numpy() for key, value in state.items()}
    for f in frames(1, 50).float():
        y, state = stream.step(f, state)
        got, *rest = session.run(None, {"image": f.numpy(), **theirs})
        theirs = dict(zip(state, rest, strict=True))
        assert relative(torch.from_numpy(got), y) < 1e-3
    assert theirs["frames"].tolist() == [50]
    assert relative(torch.from_numpy(theirs["consensus"]), state["consensus"]) < 1e-3


def tiny(**kwargs) -> nn.Module:
    channels = {"channels": (16, 16, 32, 32), "stem_width": 8}
    return timm.create_model("resnet10t", num_classes=4, **channels, **kwargs)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize(
    ("index", "seen"), [([], [1, 1, 1]), ([0, 2], [0, 1, 0]), ([True, False, False], [0, 1, 1])], ids=str
)
def test_reset_by_tuples_and_lists(kind, index, seen):
    stream = te.Stream(nn.Sequential(te.TemporalConv(3, causal=True)).eval())
    _, state = stream.step(torch.rand(3, 3, 2, 2), stream.initial_state(3, (3, 2, 2)))
    assert stream.reset(state, kind(index))["frames"].tolist() == seen


def test_state_keeps_its_order():
    """Names of an exported step's outputs are given in the order of the state."""
    model = te.inject(tiny(), "action", causal=True, paths=("ce", "me")).eval()
    stream = te.Stream(model)
    state = stream.initial_state(1, (3, 32, 32))
    te.set_fast(model, False)  # the paths run in another order
    assert list(stream.step(torch.rand(1, 3, 32, 32), state)[1]) == list(state)


def test_part_in_training_mode_is_an_error():
    model = te.inject(tiny(), "tsm", causal=True).eval()
    stream = te.Stream(model)
    stream(torch.rand(2, 3, 32, 32))
    model.layer1.train()
    with pytest.raises(RuntimeError, match=r"'layer1.* is in training mode"):
        stream(torch.rand(2, 3, 32, 32))


def test_host_that_changes_the_past_it_was_given():
    class Delay(te.modules.TemporalModule):
        def forward(self, x):
            self.check(x)
            return self.past(x)[0]

    model = te.inject(tiny(zero_init_last=False), Delay, placement="loc4", causal=True).eval()
    stream, frame = te.Stream(model), torch.rand(1, 3, 32, 32)
    _, state = stream.step(frame, stream.initial_state(1, (3, 32, 32)))
    before = {key: value.clone() for key, value in state.items()}
    first, again = (stream.step(frame, state)[0] for _ in range(2))
    assert torch.equal(first, again) and all(torch.equal(state[key], before[key]) for key in state)


def test_stream_is_saved():
    stream = te.Stream(te.inject(tiny(), "tsm", causal=True).eval())
    frames = torch.rand(3, 1, 3, 32, 32)
    stream(frames[0])
    file = io.BytesIO()
    torch.save(stream, file)
    file.seek(0)
    copy_of = torch.load(file, weights_only=False)
    assert torch.equal(copy_of(frames[1]).logits, stream(frames[1]).logits)


def test_no_torchscript():
    with pytest.raises(TypeError, match="not of TorchScript, got TopLevelTracedModule"):
        te.Stream(torch.jit.trace(nn.Conv2d(3, 2, 1), torch.rand(1, 3, 2, 2)))


def test_plans_know_autocast():
    torch.manual_seed(0)
    stream, frame = te.Stream(te.inject(tiny(), "shift", causal=True).eval()), torch.rand(1, 3, 32, 32)
    stream(frame)
    stream.reset()
    with torch.autocast("cpu", torch.bfloat16):
        stream(frame)
        stream(frame)


def test_first_layer_in_inference_mode():
    with torch.inference_mode():
        te.Stream(nn.Sequential(te.TemporalConv(3, causal=True)).eval())(torch.rand(1, 3, 2, 2))


def test_one_module_at_two_places():
    shift = te.TemporalConv(3, causal=True)
    with pytest.raises(RuntimeError, match="ran twice in one step"):
        te.Stream(nn.Sequential(shift, shift).eval())(torch.rand(1, 3, 2, 2))


def test_stream_of_replaced_layers():
    model = te.inject(timm.create_model("resnet26", num_classes=3).eval(), "mta", 2, causal=True, stages=(2,))
    te.Stream(model)(torch.rand(1, 3, 32, 32))


def test_consensus_of_half_precision():
    torch.manual_seed(0)
    stream = te.Stream(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).bfloat16().eval())
    found = [stream(torch.randn(1, 3, 1, 1).bfloat16()) for _ in range(400)]
    expected = torch.stack([output.logits for output in found]).float().mean(0)
    torch.testing.assert_close(found[-1].consensus, expected, rtol=1e-4, atol=1e-5)

"""Streams: frame by frame what the causal network gives for whole clips; their state; bad input."""

import pytest
import test_causal
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

import contextlib
import copy
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn

import temporal_excite as te
from temporal_excite import ops
from temporal_excite.complexity import CONVENTIONS, count_all

CLIP = (8, 3, 224, 224)


def network(name="resnet18", module="action", num_classes=7, **kwargs):
    model = timm.create_model(name, num_classes=num_classes)
    return te.inject(model, module, **kwargs) if module else model


# GFLOPs by fvcore's and the paper's convention, and M parameters; the tables are checked in test_flops.py.
@pytest.mark.parametrize(
    "backbone, module, classes, fvcore, paper, parameters",
    [
        ("resnet50", "action", 174, 34.669, 34.7523, 28.082),
        ("mobilenetv2_100", "action", 83, 2.519, 2.5681, 2.355),
    ],
)
def test_published_networks(backbone, module, classes, fvcore, paper, parameters):
    found = count_all(network(backbone, module, classes), CLIP)
    assert f"{found['fvcore'].flops / 1e9:.3f}" == f"{fvcore:.3f}"
    assert f"{found['paper'].flops / 1e9:.4f}" == f"{paper:.4f}"
    assert {f"{c.parameters / 1e6:.3f}" for c in found.values()} == {f"{parameters:.3f}"}


@pytest.mark.parametrize("kind", [torch.float64, torch.device("meta")])
def test_whatever_the_default_kind_of_tensors(kind):
    model = network(module="tsm")
    expected = te.count(model, (8, 3, 32, 32))
    with torch.device("meta") if isinstance(kind, torch.device) else contextlib.nullcontext():
        before = torch.get_default_dtype()
        torch.set_default_dtype(before if isinstance(kind, torch.device) else kind)
        try:
            assert te.count(model, (8, 3, 32, 32)) == expected
        finally:
            torch.set_default_dtype(before)


def test_every_operation_by_hand():
    """A network small enough to count with pencil and paper: 4 frames of 6 x 5 x 5."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(32, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2)
            self.act = nn.ReLU(inplace=True)
            self.pool = nn.MaxPool2d(2)
            self.average = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(2, 3)
            self.conv1.temporal = te.ActionModule(32, 4)

        def forward(self, x):
            x = self.conv1(self.conv1.temporal(x))
            return self.fc(self.average(self.pool(self.act(self.norm(x)))).flatten(1))

    frames, size, channels, squeezed = 4, 25, 32, 2
    shift = 3 * frames * channels * size
    ste = 27 * frames * size
    ce = frames * (channels * size + 2 * channels * squeezed + 3 * squeezed * squeezed)
    ce_relu = frames * squeezed
    me = frames * squeezed * (channels * size + 2 * size + 9 * size + size + channels)
    host = frames * (9 * 32 * 2 * size + 2 * 2 * size + 2 * 4 + 2 * 3)
    relu, pool, bias = frames * 2 * size, frames * 2 * size, frames * (2 * size + 3)
    found = count_all(Block(), (4, 32, 5, 5))
    assert found["fvcore"].flops == shift + ste + ce + me + host
    assert found["paper"].flops == found["fvcore"].flops + ce_relu + relu + pool + bias
    assert found["fvcore"].operators.keys() == {
        "conv",
        "batch_norm",
        "adaptive_avg_pool2d",
        "linear",
    }
    left_out = {"relu": 2, "max_pool2d": 1, "bias": 2}
    assert left_out.items() <= found["fvcore"].skipped.items()
    assert not left_out.keys() & found["paper"].skipped.keys()
    assert found["paper"].skipped["sigmoid"] == 3


@pytest.mark.parametrize("module", ["tsm", "shift", "ste", "ce", "me", "action"])
def test_sites_hold_what_the_modules_add(module):
    plain = count_all(network(module=None), (8, 3, 32, 32))
    model = network(module=module)
    injected = count_all(model, (8, 3, 32, 32))
    for convention in CONVENTIONS:
        rows = injected[convention].sites
        assert [r.block for r in rows] == [s.block for s in te.sites(model)]
        assert sum(r.flops for r in rows) == injected[convention].flops - plain[convention].flops
        assert (
            sum(r.parameters for r in rows) == injected[convention].parameters - plain[convention].parameters
        )
        assert sum(injected[convention].operators.values()) == injected[convention].flops
        assert (sum(r.flops for r in rows) == 0) == (module == "tsm")


def test_plain_networks_count_as_fvcore_counts_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis
    for name in ("resnet18", "mobilenetv2_050", "efficientnet_b0"):
        model = timm.create_model(name).eval()
        analysis = FlopCountAnalysis(model, torch.zeros(2, 3, 32, 32))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert te.count(model, (2, 3, 32, 32)).flops == analysis.total()


def test_the_count_is_for_the_whole_clip_shape():
    model = network()
    one, three = (te.count(model, shape).flops for shape in ((8, 3, 32, 32), (3, 8, 3, 32, 32)))
    assert three == 3 * one
    assert te.count(te.set_n_segment(model, 4), (4, 3, 32, 32)).flops == one // 2


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 5, 4, 7), (8, 16, 2, 3)])
def test_the_countable_form_computes_the_same(shape):
    frames, channels, *_ = shape
    x = torch.randn(2 * frames, *shape[1:], dtype=torch.float64)
    weight = torch.randn(channels, 1, 3, dtype=torch.float64)
    plain = ops.temporal_conv(x, weight, frames)
    with ops.countable():
        torch.testing.assert_close(ops.temporal_conv(x, weight, frames), plain, rtol=1e-13, atol=1e-13)
    assert not ops._countable


def test_the_model_is_not_touched():
    model = network().train()
    model.layer1.eval()  # a mixed state must survive
    before = copy.deepcopy(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    te.count(model, (8, 3, 32, 32))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.grad is None for p in model.parameters())


def test_models_of_any_kind_of_storage():
    expected = te.count(network(), (8, 3, 32, 32))
    with torch.device("meta"):
        on_meta = network()
    assert te.count(on_meta, (8, 3, 32, 32)) == expected
    assert all(p.is_meta for p in on_meta.parameters())
    half = network().half().to(memory_format=torch.channels_last)
    assert te.count(half, (8, 3, 32, 32)) == expected
    assert te.count(torch.compile(network()), (8, 3, 32, 32)) == expected
    in_part = network()
    in_part.layer2 = torch.compile(in_part.layer2)
    assert te.count(in_part, (8, 3, 32, 32)) == expected
    checkpointing = network()
    checkpointing.set_grad_checkpointing(True)
    assert te.count(checkpointing.train(), (8, 3, 32, 32)) == expected


def test_no_warning_and_no_log():
    """In a new interpreter: fvcore warns when it is imported."""
    code = """
import timm, warnings
import temporal_excite as te
model = te.inject(timm.create_model("resnet18"), "action")
warnings.simplefilter("error")
te.count(model, (8, 3, 32, 32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_result_prints_and_pickles():
    found = te.count(network(stages=(2,)), (8, 3, 32, 32))
    lines = str(found).splitlines()
    assert f"{found.flops / 1e9:.3f} GFLOPs" in lines[0] and "8 x 3 x 32 x 32" in lines[0]
    assert [line.split()[0] for line in lines[1:-1]] == ["block", "layer1.0", "layer1.1"]
    assert "sigmoid x6" in lines[-1]
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AttributeError):
        found.flops = 0


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 1, 8, 3, 32, 32), (8, 3, 0, 32), (8, 3, 32.0, 32), (True, 3, 4, 4)]
)
def test_wrong_clip_shapes(shape):
    with pytest.raises(ValueError, match=r"clip_shape must be \(T, C, H, W\) or \(N, T, C, H, W\)"):
        te.count(network(), shape)


def test_bad_input():
    model = network()
    with pytest.raises(ValueError, match=r"unknown convention 'ptflops'; known: fvcore, paper"):
        te.count(model, (8, 3, 32, 32), "ptflops")
    with pytest.raises(ValueError, match=r"16 frames.*n_segment is 8: call set_n_segment\(model, 16\)"):
        te.count(model, (16, 3, 32, 32))
    with pytest.raises(ValueError, match=r"ResNet fails on frames of shape \(8, 4, 32, 32\)"):
        te.count(model, (8, 4, 32, 32))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        te.count("resnet50", (8, 3, 32, 32))
    assert not ops._countable


def test_efficiency():
    # Section 4.5 divides rounded percentages; Figure 4 unrounded ones.
    assert te.efficiency(5.1, 1.8) == pytest.approx(2.83, abs=0.005)
    assert te.efficiency(100 * (34.75 / 33 - 1), 2.7) == pytest.approx(1.96, abs=0.005)
    assert te.efficiency(-1, 2) == -0.5
    for gain in (0, -0.1):
        with pytest.raises(ValueError, match=f"got delta_top1={gain}"):
            te.efficiency(5.3, gain)
    for pair in ((math.nan, 1), (1, math.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            te.efficiency(*pair)
    with pytest.raises(TypeError):
        te.efficiency("5.3", 1)


def test_module_in_front_of_a_container():
    plain, model = timm.create_model("mixnet_s"), te.inject(timm.create_model("mixnet_s"), "shift", 2)
    found = te.count(model, (2, 3, 32, 32))
    assert sum(site.flops for site in found.sites) == found.flops - te.count(plain, (2, 3, 32, 32)).flops > 0


def test_shift_does_no_arithmetic():
    plain = timm.create_model("resnet18")
    skipped = te.count(plain, (8, 3, 32, 32)).skipped
    assert te.count(te.inject(plain, "tsm"), (8, 3, 32, 32)).skipped == skipped


def test_clips_of_another_length_without_modules():
    video = te.VideoClassifier(timm.create_model("resnet18"), 8)
    with pytest.raises(ValueError, match="n_segment is 8: count clips of 8"):
        te.count(video, (4, 3, 32, 32))
    with pytest.raises(TypeError, match="clip_shape must be"):
        te.count(video, 5)

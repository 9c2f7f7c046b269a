"""VideoClassifier: consensus, dropout, where n_segment comes from, and what a wrapper must survive."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import temporal_excite as te


def resnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5, **kwargs)


def injected(n_segment=4, module="action"):
    return te.inject(resnet(), module, n_segment=n_segment)


def clips(n=2, t=4, size=32):
    return torch.randn(n, t, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_mean_of_frame_logits():
    video = te.VideoClassifier(injected()).eval()
    x = clips()
    logits = video(x)
    assert logits.shape == (2, 5)
    frames = video.model(x.flatten(0, 1))
    for n in range(2):
        assert torch.allclose(logits[n], sum(frames[4 * n + t] for t in range(4)) / 4, atol=1e-6)
    assert torch.equal(video(x.flatten(0, 1)), logits)


def test_clips_do_not_mix():
    video = te.VideoClassifier(injected()).eval()
    x = clips()
    assert torch.allclose(video(x)[1:], video(x[1:]), atol=1e-6)


def test_n_segment_comes_from_the_model():
    model = injected(4)
    video = te.VideoClassifier(model)
    assert video.n_segment == 4
    assert te.VideoClassifier(model, 4).n_segment == 4
    te.set_n_segment(video, 2)
    assert video.n_segment == 2
    te.set_n_segment(model, 8)
    assert video.n_segment == 8
    assert video.eval()(clips(1, 8)).shape == (1, 5)


def test_model_without_temporal_modules_needs_n_segment():
    with pytest.raises(ValueError, match=r"ResNet holds no temporal modules .* pass n_segment"):
        te.VideoClassifier(resnet())
    video = te.VideoClassifier(resnet(), 3).eval()
    assert video(clips(2, 3)).shape == (2, 5)
    te.inject(video.model, "tsm", n_segment=8)
    with pytest.raises(ValueError, match=r"n_segment=3, but .* n_segment=8"):
        video(clips(2, 3))


def test_n_segment_is_never_stale():
    video = te.VideoClassifier(injected(4))
    te.sites(video)[0].module.ce.n_segment = 8
    with pytest.raises(ValueError, match="disagree"):
        video(clips())
    te.set_n_segment(video, 4)
    te.eject(video)
    with pytest.raises(ValueError, match="no longer holds temporal modules"):
        video(clips())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: te.VideoClassifier("resnet50"), TypeError, "got str"),
        (
            lambda: te.VideoClassifier(injected(4), 8),
            ValueError,
            r"n_segment=8, but .* n_segment=4: set_n_segment",
        ),
        (lambda: te.VideoClassifier(resnet(), 0), ValueError, "n_segment must be at least 1, got 0"),
        (lambda: te.VideoClassifier(resnet(), 2.0), TypeError, "n_segment must be an int, got 2.0"),
        (lambda: te.VideoClassifier(resnet(), 4, dropout=1.5), ValueError, "1.5"),
        (
            lambda: te.VideoClassifier(nn.Conv2d(3, 5, 1), 4),
            ValueError,
            r"no forward_features\(\) .* dropout=0",
        ),
        (lambda: te.VideoClassifier(resnet().reset_classifier, 4), TypeError, "got method"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_model_without_classifier():
    with pytest.raises(ValueError, match="Identity as its classifier; pass dropout=0"):
        te.VideoClassifier(timm.create_model("resnet10t", num_classes=0), 4)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 3, 3, 32, 32), r"3 frames, the model n_segment=4.*set_n_segment\(model, 3\)"),
        ((6, 3, 32, 32), "6 frames are not a multiple of n_segment=4"),
        ((3, 32, 32), r"3-D \(3, 32, 32\)"),
        ((1, 2, 4, 3, 32, 32), "6-D"),
    ],
)
def test_bad_clips(shape, message):
    with pytest.raises(ValueError, match=message):
        te.VideoClassifier(injected())(torch.zeros(shape))


def test_plain_model_works_without_dropout():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    video = te.VideoClassifier(model, 4, dropout=0)
    assert video(clips()).shape == (2, 5)
    with pytest.raises(ValueError, match="Sequential has no reset_classifier"):
        video.reset_head(3)


def test_dropout_is_before_the_last_layer_and_in_training_alone():
    video = te.VideoClassifier(resnet(), 4, dropout=0.5)
    x = clips()
    seen = []
    video.model.fc.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    norms = [m for m in video.modules() if isinstance(m, nn.BatchNorm2d)]
    video.train()
    for norm in norms:
        norm.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        video(x)
        features = video.model.forward_head(video.model.forward_features(x.flatten(0, 1)), pre_logits=True)
        dropped = seen[0] == 0
        assert 0.4 < dropped[features != 0].double().mean() < 0.6
        assert torch.allclose(seen[0][~dropped], 2 * features[~dropped])
        video.eval()
        video(x)
    assert torch.equal(seen[1], features)


FAMILIES = [
    "resnet10t",
    "mobilenetv2_035",
    "bninception",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "convnext_atto",
    "regnetx_002",
    "densenet121",
    "efficientnet_b0",
    "res2net50_14w_8s",
    "hgnetv2_b0",
    "repvit_m0_9",  # a classifier with batch norm
    "resnetv2_18",  # a 1x1 convolution as classifier
    "dla46x_c",
]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if i < 3 else pytest.mark.slow) for i, n in enumerate(FAMILIES)]
)
def test_split_path_is_the_model(name):
    """With a dropout that never drops, the training path gives the model's own output."""
    torch.manual_seed(0)
    video = te.VideoClassifier(timm.create_model(name, num_classes=3), 2, dropout=1e-30)
    x = clips(1, 2, 64)
    video.eval()
    video.training = True  # the split path, everything below in evaluation
    with torch.no_grad():
        split = video(x)
        assert torch.allclose(split, video.model(x.flatten(0, 1)).mean(0, keepdim=True), atol=1e-5)
    video.reset_head(7)
    assert video.eval()(x).shape == (1, 7)


def test_a_wrong_head_is_refused_before_the_model_is_changed():
    video = te.VideoClassifier(timm.create_model("resnet10t", num_classes=5), 4)
    with pytest.raises(ValueError, match="std must be at least 0, got -1"):
        video.reset_head(3, std=-1)
    assert video.model.num_classes == 5


def test_heads_that_cannot_be_split_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="pools in its classifier, ClassifierHead"):
        te.VideoClassifier(timm.create_model("sequencer2d_s"), 4)
    with torch.device("meta"), pytest.raises(ValueError, match="tuple as its classifier"):
        te.VideoClassifier(timm.create_model("efficientformer_l1"), 4)
    with torch.device("meta"), pytest.raises(ValueError, match="other layers beside its classifier, in head"):
        te.VideoClassifier(timm.create_model("shvit_s1"), 4)


def test_reset_head():
    video = te.VideoClassifier(injected().double())
    torch.manual_seed(0)
    video.reset_head(1000)
    head = video.model.get_classifier()
    assert head.weight.dtype == torch.float64
    assert 0.00095 < head.weight.std() < 0.00105
    assert not head.bias.any()
    assert video.eval()(clips().double()).shape == (2, 1000)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        video.reset_head(0)
    several = te.VideoClassifier(timm.create_model("efficientformerv2_s0"), 2, dropout=0).double()
    several.reset_head(3)
    for head in several.model.get_classifier():
        assert head.weight.dtype == torch.float64 and head.weight.std() < 0.002


def test_deepcopy_pickle_and_ema():
    video = te.VideoClassifier(injected()).eval()
    x = clips()
    expected = video(x)
    copies = [copy.deepcopy(video), pickle.loads(pickle.dumps(video)), ModelEmaV3(video).module]
    for other in copies:
        assert torch.equal(other(x), expected)
    te.set_n_segment(video, 2)
    assert [other.n_segment for other in copies] == [4, 4, 4]


def test_state_dict_is_the_models():
    model = injected()
    video = te.VideoClassifier(model)
    assert [*video.state_dict()] == [f"model.{key}" for key in model.state_dict()]


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(training):
    torch.compiler.reset()
    video = te.VideoClassifier(injected(module="tsm"), dropout=0.5 if not training else 1e-30).train(training)
    compiled = torch.compile(video, fullgraph=True, backend="eager")
    x = clips()
    assert torch.allclose(compiled(x), copy.deepcopy(video)(x), atol=1e-5)
    te.set_n_segment(video, 2)
    assert torch.allclose(compiled(clips(2, 2)), copy.deepcopy(video)(clips(2, 2)), atol=1e-5)
    with pytest.raises(Exception, match="n_segment=2"):
        compiled(x)


@pytest.mark.parametrize("module", ["action", "tsm"])
def test_export_with_dynamic_batch(module):
    video = te.VideoClassifier(injected(module=module)).eval()
    exported = torch.export.export(
        video, (clips(),), dynamic_shapes={"x": {0: torch.export.Dim("clips", min=1, max=64)}}
    ).module()
    for n in (1, 3):
        assert torch.allclose(exported(clips(n)), video(clips(n)), atol=1e-5)


def test_imports_without_timm():
    code = """
import sys
sys.modules["timm"] = None
import temporal_excite as te, torch
assert te.modules.ActionModule(16, 2)(torch.zeros(2, 16, 4, 4)).shape == (2, 16, 4, 4)
conv = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
assert te.VideoClassifier(conv, 2, dropout=0)(torch.zeros(1, 2, 3, 4, 4)).shape == (1, 5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_missing_packages_are_not_hidden():
    code = "import sys; sys.modules['temporal_excite.models.bninception'] = None; import temporal_excite"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode and "ModuleNotFoundError" in failed.stderr


def test_given_n_segment_follows():
    video = te.VideoClassifier(injected(n_segment=4), 4)
    assert te.set_n_segment(video, 8).n_segment == 8


def test_head_without_pre_logits():
    class Net(nn.Module):
        def forward_features(self, x):
            return x

        def forward_head(self, x):
            return x

        def get_classifier(self):
            return nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"forward_head\(\) without pre_logits"):
        te.VideoClassifier(Net(), 2)

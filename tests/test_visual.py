"""Maps against their definitions, what they leave behind, the pictures, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import temporal_excite as te
from temporal_excite import visual

T = 3


def video(name="resnet10t", module="action", classes=5, n_segment=T, **kwargs):
    """A small VideoClassifier in double precision, with gates and statistics away from their start."""
    torch.manual_seed(0)
    if name == "resnet10t":
        kwargs = {"channels": (8, 8, 16, 16), "stem_width": 8} | kwargs
    model = timm.create_model(name, num_classes=classes, **kwargs)
    if module:
        te.inject(model, module, n_segment)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return te.VideoClassifier(model, n_segment).double().eval()


def clips(n=2, t=T, height=64, width=48):
    return torch.randn(n, t, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def plain_grad_cam(model, x, target, layer):
    """The definition from autograd alone, clip by clip, on a copy in which nothing works in place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    layer, maps = model.model.get_submodule(layer), []
    for clip, label in zip(x, target, strict=True):
        kept = []
        handle = layer.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        logit = model.model(clip).mean(dim=0)[label]
        handle.remove()
        (gradient,) = torch.autograd.grad(logit, kept[0])
        frames = []
        for a, g in zip(kept[0], gradient, strict=True):
            total = sum(g[c].mean() * a[c] for c in range(len(a)))
            frames.append(total.clamp_min(0))
        maps.append(torch.stack(frames))
    return torch.stack(maps).detach()


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "regnetx_002"])
def test_cam_is_the_class_weighted_sum(name):
    model, x = video(name), clips()
    maps = visual.cam(model, x, [1, 4])
    with torch.no_grad():
        features = model.model.forward_features(x.flatten(0, 1)).unflatten(0, (2, T))
        head, logits = model.model.get_classifier(), model(x)
    for n, label in enumerate((1, 4)):
        for t in range(T):
            plain = sum(head.weight[label, c] * features[n, t, c] for c in range(features.shape[2]))
            torch.testing.assert_close(maps[n, t], plain.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(maps[n].mean() + head.bias[label].detach(), logits[n, label])
    assert torch.equal(visual.cam(model, x), visual.cam(model, x, logits.argmax(dim=1)))
    assert torch.equal(visual.cam(model, x.flatten(0, 1), 2), visual.cam(model, x, [2, 2]))


@pytest.mark.parametrize("module", ["action", "tsm", None])
@pytest.mark.parametrize("layer", ["layer4", "layer2", "layer3.0.bn1", "conv1"])
def test_grad_cam_is_the_plain_one(module, layer):
    model, x = video(module=module), clips()
    maps = visual.grad_cam(model, x, [1, 4], layer)
    plain = plain_grad_cam(model, x, [1, 4], layer)
    assert maps.max() > 0
    torch.testing.assert_close(maps, plain, rtol=1e-9, atol=1e-12)
    assert torch.equal(maps, visual.grad_cam(model, x, [1, 4], model.model.get_submodule(layer)))


def test_default_layer_is_the_last_stage_and_agrees_with_cam():
    model, x = video(), clips()
    maps = visual.grad_cam(model, x, 2)
    torch.testing.assert_close(maps, visual.grad_cam(model, x, 2, "layer4"))
    count = T * maps.shape[2] * maps.shape[3]
    torch.testing.assert_close(maps * count, visual.cam(model, x, 2).clamp_min(0))


def test_one_pass_sees_the_other_frames():
    """Weights of a frame hold what it does to other frames; frame by frame there would be none of that."""
    model, x = video(module="tsm"), clips(n=1)
    alone = te.VideoClassifier(te.eject(copy.deepcopy(model.model)), n_segment=T)
    assert not torch.allclose(visual.grad_cam(model, x, 0, "layer2"), visual.grad_cam(alone, x, 0, "layer2"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer", [None, "layer1", "layer3.0.bn1"])
def test_checkpointing(checkpointing, layer):
    model, x = video(), clips()
    expected = visual.grad_cam(model, x, 1, layer)
    model.model.set_grad_checkpointing(checkpointing)
    torch.testing.assert_close(visual.grad_cam(model, x, 1, layer), expected)
    torch.testing.assert_close(visual.cam(model, x, 1).shape, (2, T, 2, 2))
    assert len(visual.excitations(model, x)) == 4
    assert model.model.grad_checkpointing is checkpointing


def test_channels_last():
    model, x = video(), clips()
    expected = [visual.cam(model, x), visual.grad_cam(model, x, layer="layer2"), _flat(model, x)]
    model = model.to(memory_format=torch.channels_last)
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    found = [visual.cam(model, last), visual.grad_cam(model, last, layer="layer2"), _flat(model, last)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def _flat(model, x):
    return torch.cat([g.flatten() for site in visual.excitations(model, x) for g in site.gates.values()])


@pytest.mark.parametrize("call", [visual.cam, visual.grad_cam, visual.excitations, "layer", "wrong"])
def test_leaves_the_model_as_it_was(call):
    model, x = video(), clips()
    model.train()
    model.model.layer2.eval()  # as a frozen part is
    model.model.conv1.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        if call == "layer":
            visual.grad_cam(model, x, layer="layer1")
        elif call == "wrong":
            with pytest.raises(ValueError, match="out of range"):
                visual.grad_cam(model, x, 5, layer="layer1")
        else:
            call(model, x)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all((p.grad == 3).all() for p in model.parameters())


def test_frozen_and_in_inference_mode():
    model, x = video(), clips()
    expected = visual.grad_cam(model, x, 1, "layer2")
    model.requires_grad_(False)
    with torch.inference_mode():
        torch.testing.assert_close(visual.grad_cam(model, x.clone(), 1, "layer2"), expected)
        assert visual.grad_cam(model, x.clone(), 1).shape == (2, T, 2, 2)


@pytest.mark.parametrize("name", ["action", "ste", "ce", "me", "tea_me", "te", "start"])
def test_excitations_multiplied_back(name):
    """Each module's output, from its input and the gates."""
    torch.manual_seed(0)
    model = video(module=None).model
    if name == "start":
        te.inject(model, "action", T, identity_start=True)
        for p in (p for site in te.sites(model) for p in site.module.parameters()):
            nn.init.normal_(p, std=0.3)
    else:
        te.inject(model, name, T)
    model.double().eval()
    x, seen = clips(), {}
    for site in te.sites(model):
        site.module.register_forward_hook(lambda m, i, o, key=site.layer: seen.update({key: (i[0], o)}))
    found = visual.excitations(model, x)
    assert [g.layer for g in found] == [s.layer for s in te.sites(model)]
    for site, part in zip(te.sites(model), found, strict=True):
        given, output = seen[site.layer]
        gates = {
            path: g.flatten(0, 1)[:, None] if path == "ste" else g.flatten(0, 1)[..., None, None]
            for path, g in part.gates.items()
        }
        assert (part.block, part.stage, part.kind) == (site.block, site.stage, site.kind)
        if name == "tea_me":
            plain = given * (1 + gates["me"])
        elif name == "te":
            module = site.module
            pooled = given.mean(dim=(2, 3)).unflatten(0, (-1, T)).transpose(1, 2)
            kernel = module.fc2(module.fc1(pooled)).softmax(dim=-1)
            y = (given * gates["te"]).unflatten(0, (-1, T))
            taps = kernel.unbind(-1)
            plain = torch.zeros_like(y)
            for t in range(T):
                for tap, source in zip(taps, (t - 1, t, t + 1), strict=True):
                    if 0 <= source < T:
                        plain[:, t] += tap[:, :, None, None] * y[:, source]
            plain = plain.flatten(0, 1)
        else:
            y = site.module.shift(given)
            if name == "start":
                plain = y * (1 + sum(2 * g - 1 for g in gates.values()) / len(gates))
            else:
                plain = sum(y + y * g for g in gates.values())
            assert list(gates) == (["ste", "ce", "me"] if name in ("action", "start") else [name])
        torch.testing.assert_close(output, plain)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",  # a layer between pool and classifier
        "convnext_atto",  # norm behind the pool
        "densenet121",
        "efficientnet_b0",
        "mambaout_femto",  # (B, H, W, C)
        "ghostnet_050",
        "bninception",
    ],
)
@pytest.mark.slow
def test_host_families(name):
    model, x = video(name, n_segment=2), clips(n=1, t=2, height=64, width=96)
    maps = visual.grad_cam(model, x)
    assert maps.shape[:2] == (1, 2) and maps.shape[3] > maps.shape[2] >= 2
    assert visual.excitations(model, x)
    if name in ("mobilenetv3_small_050", "convnext_atto", "mambaout_femto", "ghostnet_050"):
        with pytest.raises(ValueError, match="grad_cam"):
            visual.cam(model, x)
    else:
        assert visual.cam(model, x).shape == maps.shape


EXAMPLES = json.loads((Path(__file__).parent / "timm_examples.json").read_text())
TOKENS = {"efficientformer_l1", "vit_small_r26_s32_224", "vitamin_small_224"}  # end in (B, N, C)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_host_of_every_block_class(name, size):
    model = te.inject(timm.create_model(name, num_classes=5), "tsm", n_segment=2)
    model = te.VideoClassifier(model, dropout=0.0).eval()
    x = torch.randn(1, 2, 3, size, size)
    if name in TOKENS:
        with pytest.raises(ValueError, match=r"is no feature map .* choose another layer"):
            visual.grad_cam(model, x)
        return
    maps = visual.grad_cam(model, x)
    assert maps.shape[:2] == (1, 2) and maps.isfinite().all()


# ---- what is refused
def test_wrong_input():
    model, x = video(), clips()
    for call in (visual.cam, visual.grad_cam, visual.excitations):
        with pytest.raises(ValueError, match=r"4 frames, the model n_segment=3"):
            call(model, clips(t=4))
        with pytest.raises(TypeError, match=r"torch\.uint8"):
            call(model, (x * 0).to(torch.uint8))
        with pytest.raises(ValueError, match="at least one clip"):
            call(model, x[:0])
    for call in (visual.cam, visual.grad_cam):
        with pytest.raises(ValueError, match=r"target 5 is out of range: the model has classes 0 to 4"):
            call(model, x, 5)
        with pytest.raises(ValueError, match=r"target -1 is out of range"):
            call(model, x, [0, -1])
        with pytest.raises(ValueError, match="one for each clip"):
            call(model, x, [0, 1, 2])
        with pytest.raises(TypeError, match="class number"):
            call(model, x, 1.0)
        with pytest.raises(TypeError, match="VideoClassifier"):
            call(model.model, x)


def test_unknown_layer():
    model, x = video(), clips()
    with pytest.raises(ValueError, match=r"no layer 'layer5'; it has .*layer4"):
        visual.grad_cam(model, x, layer="layer5")
    with pytest.raises(ValueError, match="does not hold the given ReLU"):
        visual.grad_cam(model, x, layer=nn.ReLU())
    with pytest.raises(TypeError, match="name or a module, got int"):
        visual.grad_cam(model, x, layer=4)
    with pytest.raises(ValueError, match="no feature map"):
        visual.grad_cam(model, x, layer="fc")
    model.model.unused = nn.Conv2d(3, 3, 1).double()
    with pytest.raises(ValueError, match="runs 0 times"):
        visual.grad_cam(model, x, layer="unused")


def test_layer_that_runs_twice_or_has_no_part():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.side, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.ReLU()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            self.side(x)
            return self.fc(self.twice(self.twice(self.conv(x))).mean(dim=(2, 3)))

    model, x = te.VideoClassifier(Net().double(), T, dropout=0), clips()
    with pytest.raises(ValueError, match="'twice' runs 2 times"):
        visual.grad_cam(model, x, layer="twice")
    with pytest.raises(ValueError, match="'side' has no part in the logits"):
        visual.grad_cam(model, x, layer="side")
    with pytest.raises(ValueError, match="name the layer"):
        visual.grad_cam(model, x)
    with pytest.raises(ValueError, match="grad_cam"):
        visual.cam(model, x)
    assert visual.grad_cam(model, x, 1, "conv").shape == (2, T, 62, 46)


def test_nothing_to_excite():
    with pytest.raises(ValueError, match="no module with a gate: it holds TemporalShift"):
        visual.excitations(video(module="tsm"), clips())
    with pytest.raises(ValueError, match="no module with a gate: it holds no temporal modules"):
        visual.excitations(video(module=None), clips())
    with pytest.raises(ValueError, match="no module with a gate: it holds"):  # SEModule.gate is a layer
        visual.excitations(video(module="2plus1d_se"), clips())
    with pytest.raises(ValueError, match="STE weighs positions"):
        visual.attention(visual.excitations(video(module="ste"), clips()))


# ---- pictures
def test_overlay():
    clip = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    maps = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[4.0, 4.0], [4.0, 4.0]]])
    frames = visual.overlay(clip, maps, alpha=0.25, colormap="gray")
    assert frames.shape == clip.shape and frames.dtype == torch.uint8
    assert (frames[0] == 75).all() and (frames[1] == round(75 + 0.25 * 255)).all()
    assert torch.equal(visual.overlay(clip, maps, alpha=0), clip)
    assert torch.equal(visual.overlay(clip, 0 * maps, colormap="gray", alpha=1), 0 * clip)  # nothing anywhere
    normal = (clip / 255 - 0.5) / 0.2
    assert torch.equal(visual.unnormalise(normal[None], (0.5,) * 3, (0.2,) * 3), clip)
    with pytest.raises(ValueError, match=r"each of the 2 frames, \(T, h, w\), got \(3, 2, 2\)"):
        visual.overlay(clip, torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="alpha"):
        visual.overlay(clip, maps, alpha=2)
    with pytest.raises(ValueError, match="low must be below high, got 2 and 1"):
        visual.overlay(clip, maps, low=2, high=1)
    with pytest.raises(ValueError, match=r"of uint8 or of floating point, got torch\.int64"):
        visual.unnormalise(clip.long())
    with pytest.raises(ValueError, match="colormap 'none'"):
        visual.overlay(clip, maps, colormap="none")
    with pytest.raises(ValueError, match=r"one clip \(T, 3, H, W\), got \(2, 1, 4, 4\)"):
        visual.overlay(clip[:, :1], maps)


def test_figure_and_animation(tmp_path):
    rows = {"input": torch.randint(256, (4, 3, 20, 30), dtype=torch.uint8), "a long name of a network": None}
    rows["a long name of a network"] = 255 - rows["input"]
    drawn = visual.figure(rows, tmp_path / "rows.png", title="a\n$\\frac$ b", columns=(0, 3))
    assert len(drawn.axes) == 4 and Image.open(tmp_path / "rows.png").width > 300
    visual.figure(rows, tmp_path / "rows.pdf")
    assert (tmp_path / "rows.pdf").read_bytes().startswith(b"%PDF")
    for ending in ("gif", "webp"):
        visual.animation(rows, tmp_path / f"rows.{ending}", fps=5, side=40)
        moving = Image.open(tmp_path / f"rows.{ending}")
        assert moving.n_frames == 4 and moving.size == (124, 60)


def test_attention(tmp_path):
    gates = visual.excitations(video(), clips())
    drawn = visual.attention(gates, tmp_path / "attention.png", clip=1)
    panels = [ax for ax in drawn.axes if ax.images]
    assert [ax.get_title() for ax in panels] == [f"{p}, res{s}" for p in ("CE", "ME") for s in (2, 3, 4, 5)]
    shown = panels[-1].images[0].get_array()
    order = gates[-1].gates["me"][1].mean(dim=0).argsort(descending=True)
    torch.testing.assert_close(
        torch.as_tensor(shown).double(), gates[-1].gates["me"][1][:, order].T, rtol=1e-6, atol=0
    )


def test_unwritable(tmp_path):
    rows = {"input": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "taken.gif").mkdir()
    for write, ending in ((visual.figure, "png"), (visual.animation, "gif")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            write(rows, tmp_path / "none" / f"a.{ending}")
        with pytest.raises(ValueError, match=r"the ending must be one of \."):
            write(rows, tmp_path / "a.txt")
        with pytest.raises(OSError, match="cannot write"):
            write(rows, tmp_path / f"taken.{ending}")
        with pytest.raises(ValueError, match="at least one row"):
            write({}, tmp_path / f"a.{ending}")
        with pytest.raises(ValueError, match="different numbers of frames"):
            write(rows | {"b": rows["input"][:1]}, tmp_path / f"a.{ending}")
        with pytest.raises(ValueError, match="must be uint8 frames"):
            write({"a": rows["input"].float()}, tmp_path / f"a.{ending}")
    with pytest.raises(ValueError, match="columns must be frames out of 0 to 1"):
        visual.figure(rows, columns=[2])
    with pytest.raises(ValueError, match="fps"):
        visual.animation(rows, tmp_path / "a.gif", fps=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.gif", "taken.png"]


def test_gates_of_a_compiled_network():
    """Compiled code would run past the hooks."""
    torch.manual_seed(0)
    network = te.inject(timm.create_model("resnet10t", num_classes=3), "action", 2).eval()
    clip = torch.randn(1, 2, 3, 32, 32)
    expected = visual.excitations(network, clip)
    network.compile(backend="eager")
    model = te.VideoClassifier(network, dropout=0.0).eval()
    with torch.no_grad():
        model(clip)
    found = visual.excitations(model, clip)
    assert [site.layer for site in found] == [site.layer for site in expected] and len(found) == 4
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a.gates[name], b.gates[name]) for name in b.gates)


@pytest.mark.parametrize(
    ("name", "size", "layer", "shape"),
    [
        ("convnext_atto", (64, 96), None, (2, 3)),
        ("convnext_tiny", (64, 96), "stages.2.blocks.1.norm", (4, 6)),
        ("swin_tiny_patch4_window7_224", (224, 224), None, (7, 7)),
    ],
)
def test_channels_last_layers(name, size, layer, shape):
    model = te.VideoClassifier(timm.create_model(name, num_classes=3), 2, dropout=0.0).eval()
    assert visual.grad_cam(model, torch.randn(1, 2, 3, *size), 0, layer).shape == (1, 2, *shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cam_of_half_precision(dtype):
    torch.manual_seed(0)
    clip = torch.randn(1, 2, 3, 64, 64)
    linear = te.VideoClassifier(timm.create_model("resnet10t", num_classes=5), 2, dropout=0.0).eval()
    exact = visual.cam(linear, clip, 0)
    found = visual.cam(linear.to(dtype), clip.to(dtype), 0)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()
    other = te.VideoClassifier(timm.create_model("convnext_atto", num_classes=5), 2, dropout=0.0).eval()
    with pytest.raises(ValueError, match="linear in the mean"):
        visual.cam(other.to(dtype), clip.to(dtype), 0)


def test_cam_under_autocast():
    torch.manual_seed(0)
    model = te.VideoClassifier(timm.create_model("resnet10t", num_classes=5), 2, dropout=0.0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert visual.cam(model, torch.randn(1, 2, 3, 64, 64), 0).dtype == torch.float32


def test_animation_of_labels_with_lines(tmp_path):
    visual.animation({"STE\nres2": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("target", ["a", [None, 1]], ids=str)
def test_targets_that_are_no_numbers(target):
    model = te.VideoClassifier(timm.create_model("resnet10t", num_classes=5), 2, dropout=0.0).eval()
    with pytest.raises(TypeError, match="target must be a class number"):
        visual.grad_cam(model, torch.randn(1, 2, 3, 32, 32), target)


def test_overlay_of_maps_that_are_not_finite():
    frames, maps = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 4, 4), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        visual.overlay(frames, maps)


def test_colours_as_tensors():
    clip = torch.randn(2, 3, 4, 4)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    expected = visual.unnormalise(clip, mean, std)
    assert torch.equal(visual.unnormalise(clip, torch.tensor(mean), torch.tensor(std)), expected)

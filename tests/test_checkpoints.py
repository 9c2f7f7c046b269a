"""load_released against networks written here in the released layout: the same names, plain operations."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.models import resnet as tv_resnet

import temporal_excite as te
from temporal_excite.models.bninception import checkpoint_filter_fn

T = 3
CLASSES = 5


class ReleasedAction(nn.Module):
    """The released ACTION module, its layers under their names, on the input of ``net``."""

    def __init__(self, net, channels, call_net=True):
        super().__init__()
        r = channels // 16
        self.net = net
        self.call_net = call_net
        self.action_shift = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.action_p1_conv1 = nn.Conv3d(1, 1, 3, padding=1, bias=False)
        self.action_p2_squeeze = nn.Conv2d(channels, r, 1, bias=False)
        self.action_p2_conv1 = nn.Conv1d(r, r, 3, padding=1, bias=False)
        self.action_p2_expand = nn.Conv2d(r, channels, 1, bias=False)
        self.action_p3_squeeze = nn.Conv2d(channels, r, 1, bias=False)
        self.action_p3_bn1 = nn.BatchNorm2d(r)
        self.action_p3_conv1 = nn.Conv2d(r, r, 3, padding=1, groups=r, bias=False)
        self.action_p3_expand = nn.Conv2d(r, channels, 1, bias=False)

    def forward(self, x):
        h, w = x.shape[2:]
        y = self.action_shift(rearrange(x, "(n t) c h w -> (n h w) c t", t=T))
        y = rearrange(y, "(n h w) c t -> (n t) c h w", h=h, w=w)

        mask = self.action_p1_conv1(rearrange(y.mean(1), "(n t) h w -> n 1 t h w", t=T))
        p1 = y + y * rearrange(mask, "n 1 t h w -> (n t) 1 h w").sigmoid()

        z = self.action_p2_squeeze(y.mean((2, 3), keepdim=True))
        z = self.action_p2_conv1(rearrange(z, "(n t) r 1 1 -> n r t", t=T)).relu()
        p2 = y + y * self.action_p2_expand(rearrange(z, "n r t -> (n t) r 1 1")).sigmoid()

        f = self.action_p3_bn1(self.action_p3_squeeze(y))
        moved = rearrange(self.action_p3_conv1(f), "(n t) r h w -> n t r h w", t=T)
        f = rearrange(f, "(n t) r h w -> n t r h w", t=T)
        motion = torch.zeros_like(f)
        for t in range(T - 1):
            motion[:, t] = moved[:, t + 1] - f[:, t]
        motion = motion.mean((3, 4), keepdim=True).flatten(0, 1)
        p3 = y + y * self.action_p3_expand(motion).sigmoid()

        return self.net(p1 + p2 + p3) if self.call_net else p1 + p2 + p3


class ReleasedShift(nn.Module):
    """The released TSM shift on the input of ``net``."""

    def __init__(self, net, channels):
        super().__init__()
        self.net = net
        self.fold = channels // 8

    def forward(self, x):
        clips = rearrange(x, "(n t) c h w -> n t c h w", t=T)
        out = torch.zeros_like(clips)
        fold = self.fold
        for t in range(T):
            if t + 1 < T:
                out[:, t, :fold] = clips[:, t + 1, :fold]
            if t > 0:
                out[:, t, fold : 2 * fold] = clips[:, t - 1, fold : 2 * fold]
            out[:, t, 2 * fold :] = clips[:, t, 2 * fold :]
        return self.net(out.flatten(0, 1))


class ReleasedTSN(nn.Module):
    """The released wrapper: the network without its last layer, ``new_fc``, the mean over the frames."""

    def __init__(self, base_model, head, features):
        super().__init__()
        setattr(base_model, head, nn.Dropout(0.0))
        self.base_model = base_model
        self.new_fc = nn.Linear(features, CLASSES)

    def forward(self, x):
        return self.new_fc(self.base_model(x.flatten(0, 1))).unflatten(0, (-1, T)).mean(1)


def released_resnet(wrap):
    net = tv_resnet.ResNet(tv_resnet.Bottleneck, [1, 2, 1, 1])
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            block.conv1 = wrap(block.conv1, block.conv1.in_channels)
    return ReleasedTSN(net, "fc", 2048)


def our_resnet():
    return timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (1, 2, 1, 1), num_classes=CLASSES)


class FlatResidual(nn.Module):
    """An inverted residual whose layers are one flat sequence."""

    def __init__(self, inputs, outputs, stride, expand, wrap):
        super().__init__()
        hidden = inputs * expand
        self.skip = stride == 1 and inputs == outputs
        layers = []
        if expand > 1:
            pointwise = nn.Conv2d(inputs, hidden, 1, bias=False)
            layers += [
                wrap(pointwise, inputs) if self.skip else pointwise,
                nn.BatchNorm2d(hidden),
                nn.ReLU6(),
            ]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)]
        layers += [nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class FlatMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., Table 2) as one sequence ``features``."""

    def __init__(self, wrap):
        super().__init__()

        def conv_norm(i, o, k, stride):
            return nn.Sequential(
                nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU6()
            )

        layers = [conv_norm(3, 32, 3, 2)]
        inputs = 32
        for expand, outputs, repeats, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for i in range(repeats):
                layers.append(FlatResidual(inputs, outputs, stride if i == 0 else 1, expand, wrap))
                inputs = outputs
        layers.append(conv_norm(320, 1280, 1, 1))
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def released_mobilenet(wrap):
    return ReleasedTSN(FlatMobileNetV2(wrap), "classifier", 1280)


def our_mobilenet():
    return timm.create_model("mobilenetv2_100", num_classes=CLASSES)


class CaffeInception(nn.Module):
    """BNInception (Ioffe, Szegedy, Figure 5), all layers on one level under their Caffe names."""

    BLOCKS = (
        ("3a", 192, 64, 64, 64, 64, 96, 32, "avg"),
        ("3b", 256, 64, 64, 96, 64, 96, 64, "avg"),
        ("3c", 320, 0, 128, 160, 64, 96, 0, "max"),
        ("4a", 576, 224, 64, 96, 96, 128, 128, "avg"),
        ("4b", 576, 192, 96, 128, 96, 128, 128, "avg"),
        ("4c", 576, 160, 128, 160, 128, 160, 128, "avg"),
        ("4d", 608, 96, 128, 192, 160, 192, 128, "avg"),
        ("4e", 608, 0, 128, 192, 192, 256, 0, "max"),
        ("5a", 1056, 352, 192, 320, 160, 224, 128, "avg"),
        ("5b", 1024, 352, 192, 320, 192, 224, 128, "max"),
    )

    def __init__(self, action=True):
        super().__init__()
        self.add_conv("conv1_7x7_s2", 3, 64, 7, 2)
        self.add_conv("conv2_3x3_reduce", 64, 64, 1)
        self.add_conv("conv2_3x3", 64, 192, 3)
        for name, inputs, one, reduce3, three, reduce33, double, proj, _ in self.BLOCKS:
            stride = 1 if one else 2
            prefix = f"inception_{name}_"
            if one:
                self.add_conv(prefix + "1x1", inputs, one, 1)
            self.add_conv(prefix + "3x3_reduce", inputs, reduce3, 1)
            self.add_conv(prefix + "3x3", reduce3, three, 3, stride)
            self.add_conv(prefix + "double_3x3_reduce", inputs, reduce33, 1)
            self.add_conv(prefix + "double_3x3_1", reduce33, double, 3)
            self.add_conv(prefix + "double_3x3_2", double, double, 3, stride)
            if proj:
                self.add_conv(prefix + "pool_proj", inputs, proj, 1)
        self.actions = {}
        previous = "2"
        for name, inputs, one, *_ in self.BLOCKS if action else ():
            net = getattr(self, f"inception_{name}_{'1x1' if one else '3x3_reduce'}")
            self.actions[name] = f"shift_{previous}"
            self.add_module(f"shift_{previous}", ReleasedAction(net, inputs, call_net=False))
            previous = name
        self.fc = nn.Linear(1024, CLASSES)

    def add_conv(self, name, inputs, outputs, kernel, stride=1):
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
        self.add_module(name + "_bn", nn.BatchNorm2d(outputs, momentum=0.9))

    def conv(self, name, x):
        return getattr(self, name + "_bn")(getattr(self, name)(x)).relu()

    def forward(self, x):
        x = F.max_pool2d(self.conv("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = self.conv("conv2_3x3", self.conv("conv2_3x3_reduce", x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for name, _, one, _, _, _, _, _, pool in self.BLOCKS:
            if name in self.actions:
                x = getattr(self, self.actions[name])(x)
            prefix = f"inception_{name}_"
            three = self.conv(prefix + "3x3", self.conv(prefix + "3x3_reduce", x))
            double = self.conv(prefix + "double_3x3_1", self.conv(prefix + "double_3x3_reduce", x))
            double = self.conv(prefix + "double_3x3_2", double)
            if not one:
                x = torch.cat([three, double, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
                continue
            pooled = F.avg_pool2d(x, 3, 1, 1) if pool == "avg" else F.max_pool2d(x, 3, 1, 1)
            x = torch.cat(
                [self.conv(prefix + "1x1", x), three, double, self.conv(prefix + "pool_proj", pooled)], 1
            )
        return self.fc(x.mean((2, 3)))


def our_bninception():
    return timm.create_model("bninception", num_classes=CLASSES)


def randomize(model):
    """Random weights and batch-norm statistics that keep activations near unit size."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
            tensor.normal_(std=fan**-0.5)
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.abs_().add_(0.5)
    return model.double()


NETWORKS = {
    "resnet-action": (lambda: released_resnet(ReleasedAction), our_resnet, "action"),
    "resnet-tsm": (lambda: released_resnet(ReleasedShift), our_resnet, "tsm"),
    "resnet-tsn": (lambda: released_resnet(lambda net, channels: net), our_resnet, None),
    "mobilenet-action": (lambda: released_mobilenet(ReleasedAction), our_mobilenet, "action"),
    "mobilenet-tsm": (lambda: released_mobilenet(ReleasedShift), our_mobilenet, "tsm"),
    "bninception-action": (lambda: ReleasedTSN(CaffeInception(), "fc", 1024), our_bninception, "action"),
    "bninception-tsn": (lambda: ReleasedTSN(CaffeInception(False), "fc", 1024), our_bninception, None),
}


@functools.cache
def released(name):
    return randomize(NETWORKS[name][0]())


def ours(name, dropout=0.0):
    _, make, module = NETWORKS[name]
    model = make()
    if module:
        te.inject(model, module, n_segment=T)
    return te.VideoClassifier(model.double(), T, dropout=dropout)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_statistics_equal_the_released_layout(name):
    reference = copy.deepcopy(released(name))
    video = te.load_released(ours(name), {"state_dict": reference.state_dict()})
    x = torch.randn(2, T, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        grads = []
        for model in (reference.train(training), video.train(training)):
            frames = x.clone().requires_grad_()
            y = model(frames)
            y.square().sum().backward()
            grads.append((y.detach(), frames.grad))
        for expected, found in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    after = te.load_released(ours(name), reference.state_dict())  # statistics moved by the training step
    for key, tensor in after.state_dict().items():
        torch.testing.assert_close(video.state_dict()[key], tensor, rtol=1e-8, atol=1e-10, msg=key)


def filled(model):
    """Whether nothing of a fresh model's state was touched: its tensors' sums."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_refused(model, checkpoint, message, error=ValueError):
    before = filled(model)
    with pytest.raises(error, match=message):
        te.load_released(model, checkpoint)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def state(name="resnet-tsm"):
    return dict(released(name).state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_from_a_file(tmp_path, prefix):
    path = tmp_path / "released.pth.tar"
    torch.save({"epoch": 3, "state_dict": {prefix + k: v for k, v in state().items()}, "arch": "x"}, path)
    video = ours("resnet-tsm")
    assert te.load_released(video, path) is video
    assert torch.equal(video.model.fc.bias, state()["new_fc.bias"])
    assert torch.equal(te.load_released(ours("resnet-tsm"), str(path)).model.fc.bias, video.model.fc.bias)


def test_bare_model_takes_the_head_too():
    model = te.load_released(ours("resnet-tsm").model, state())
    assert torch.equal(model.fc.weight, state()["new_fc.weight"])


def test_head_without_dropout_and_without_prefix():
    """With dropout 0 the released wrapper keeps the classifier in the network."""
    tensors = {k.removeprefix("base_model.").replace("new_fc", "fc"): v for k, v in state().items()}
    assert torch.equal(te.load_released(ours("resnet-tsm"), tensors).model.fc.bias, tensors["fc.bias"])


def test_casts_to_the_models_dtype():
    model = ours("resnet-tsm").float()
    te.load_released(model, state())
    assert torch.equal(model.model.fc.weight, state()["new_fc.weight"].float())


def test_num_batches_tracked_may_be_absent():
    tensors = {k: v for k, v in state("resnet-action").items() if "num_batches_tracked" not in k}
    te.load_released(ours("resnet-action"), tensors)


def test_one_copy_of_a_shared_tensor_is_enough():
    name = "bninception-action"
    tensors = state(name)
    whole = te.load_released(ours(name), tensors).state_dict()
    for gone in (".net.", "inception_3a_1x1.", "inception_4e_3x3_reduce."):
        some = {k: v for k, v in tensors.items() if gone not in k}
        assert len(some) < len(tensors)
        found = te.load_released(ours(name), some).state_dict()
        assert all(torch.equal(found[k], whole[k]) for k in whole)
    tensors["base_model.shift_2.net.bias"] = tensors["base_model.shift_2.net.bias"] + 1
    message = "1 unequal: inception_3a_1x1.bias and shift_2.net.bias"
    assert_refused(ours(name), tensors, message)


@pytest.mark.parametrize(
    "name, other, message",
    [
        (
            "resnet-action",
            "resnet-tsm",
            r"has TSM's shifts: inject\(model, 'tsm'\).*missing: layer1.0.conv1.action_sh",
        ),
        (
            "resnet-tsm",
            "resnet-action",
            r"has ACTION modules: inject\(model, 'action'\).*65 not the model's: ",
        ),
        ("resnet-tsm", "resnet-tsn", "has no temporal modules.*missing: layer1.0.conv1.net.weight"),
        ("resnet-tsn", "resnet-tsm", "ResNet with no temporal modules.*missing: layer1.0.conv1.weight"),
        ("resnet-action", "mobilenet-action", "5 ActionModule.*missing"),
        (
            "bninception-action",
            "resnet-action",
            "BNInception with 10 ActionModule.*missing: conv1_7x7_s2.weight",
        ),
    ],
)
def test_another_network(name, other, message):
    assert_refused(ours(name), state(other), message)


def test_none_of_the_keys():
    assert_refused(
        ours("resnet-tsn"), {"stem.weight": torch.zeros(3)}, "another network .* none of the expected keys"
    )


def test_every_unknown_and_missing_key_is_counted():
    tensors = state()
    del tensors["base_model.layer2.0.bn3.running_var"]
    tensors["base_model.extra.weight"] = torch.zeros(2)
    message = "nothing was loaded.*1 missing: layer2.0.bn3.running_var; 1 not the model's: extra.weight"
    assert_refused(ours("resnet-tsm"), tensors, message)


def test_another_number_of_classes():
    model = te.inject(timm.create_model("mobilenetv2_100", num_classes=7), "tsm")
    message = r"new_fc.weight \(5, 1280\), here \(7, 1280\).*create the model with the checkpoint's"
    assert_refused(model, state("mobilenet-tsm"), message)


def test_another_shape():
    tensors = state()
    tensors["base_model.conv1.weight"] = torch.zeros(64, 4, 7, 7)
    assert_refused(
        ours("resnet-tsm"), tensors, r"1 of another shape: conv1.weight \(64, 4, 7, 7\), here \(64, 3, 7, 7\)"
    )


def test_files_that_are_no_checkpoints(tmp_path):
    model = ours("resnet-tsm")
    whole = tmp_path / "whole.pth"
    torch.save(state(), whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:100_000])
    assert_refused(model, truncated, "truncated.pth is not a PyTorch checkpoint, or is damaged")
    text = tmp_path / "text.pth"
    text.write_text("not a checkpoint")
    assert_refused(model, text, "text.pth is not a PyTorch checkpoint")
    empty = tmp_path / "empty.pth"
    empty.touch()
    assert_refused(model, empty, "empty.pth is not a PyTorch checkpoint")
    objects = tmp_path / "objects.pth"
    torch.save({"state_dict": state(), "model": nn.Linear(1, 1)}, objects)
    assert_refused(model, objects, "which are not loaded because they can run code")
    listed = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], listed)
    assert_refused(model, listed, "list.pth must hold a dict, it holds a list")
    assert_refused(model, tmp_path / "absent.pth", "absent.pth", FileNotFoundError)


@pytest.mark.parametrize(
    "checkpoint, message, error",
    [
        ({}, "holds no tensors", ValueError),
        ({"state_dict": {}}, "holds no tensors", ValueError),
        ({"lr": 0.1}, "'lr' is a float, not a tensor", ValueError),
        ({3: torch.zeros(1)}, "3 is not the name of a tensor", ValueError),
        ({"state_dict": [1]}, "state_dict is a list", ValueError),
        ({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "holds 'a' twice", ValueError),
        (7, "must be a path or a dict, got int", TypeError),
    ],
)
def test_dicts_that_are_no_checkpoints(checkpoint, message, error):
    assert_refused(ours("resnet-tsn"), checkpoint, message, error)


def test_models_without_released_weights():
    for model in (timm.create_model("regnetx_002"), nn.Linear(2, 2)):
        assert_refused(model, state(), f"no released weights for {type(model).__name__}")
    assert_refused(timm.create_model("efficientnet_lite0"), state(), "EfficientNet has|does not fit")
    with pytest.raises(TypeError, match="got str"):
        te.load_released("resnet50", state())


def test_models_that_compute_another_form():
    model = te.inject(our_resnet(), "action", n_segment=T, identity_start=True)
    assert_refused(
        model, state("resnet-action"), "has identity_start=True; the released .* identity_start=False"
    )
    model = te.inject(our_resnet(), "action", n_segment=T, relu=False)
    assert_refused(model, state("resnet-action"), "has relu=False; the released .* relu=True")
    model = te.inject(our_resnet(), "tsm", n_segment=T, placement="loc2")
    assert_refused(
        model, state(), "TemporalShift is at loc2 of layer1.0, the released networks have it at loc1"
    )
    model = te.inject(our_resnet(), te.STE, n_segment=T)
    assert_refused(model, state(), "no released layout for STE at layer1.0.conv1; known: ActionModule")


def test_caffe_named_imagenet_file(tmp_path):
    """timm's own route, with the two quirks of such files: (1, C) batch norms and ``last_linear``."""
    reference = randomize(CaffeInception(action=False)).float().eval()
    tensors = reference.state_dict()
    for key, tensor in tensors.items():
        if "_bn." in key and tensor.ndim == 1:
            tensors[key] = tensor[None]
    for part in ("weight", "bias"):
        tensors[f"last_linear.{part}"] = tensors.pop(f"fc.{part}")
    path = tmp_path / "bn_inception.pth"
    torch.save({k: v for k, v in tensors.items() if "num_batches" not in k}, path)
    model = timm.create_model(
        "bninception",
        num_classes=CLASSES,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": CLASSES},
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    te.load_released(our_bninception(), path)


@pytest.mark.parametrize("module", ["action", "tea"])
def test_causal_is_another_network(module):
    with torch.device("meta"):
        model = te.inject(
            timm.create_model("res2net50_26w_4s" if module == "tea" else "resnet50"), module, causal=True
        )
    with pytest.raises(
        ValueError, match=r"causal=True; the released networks compute the form with .*causal=False"
    ):
        te.load_released(model, {"a": torch.zeros(1)})


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda t: t.to("meta"), torch.Tensor.bool])
def test_tensors_without_numbers(change):
    model = timm.create_model("resnet18", num_classes=CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "layer3.0.conv2.weight"
    with pytest.raises(ValueError, match=name):
        te.load_released(model, before | {name: change(before[name])})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "text", ["version https://git-lfs.github.com/spec/v1", "<!DOCTYPE html>", "hello", ""]
)
def test_downloads_that_failed(tmp_path, text):
    path = tmp_path / "x.pth"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a PyTorch checkpoint, or is damaged") as caught:
        te.load_released(timm.create_model("resnet18"), path)
    assert "weights_only" not in str(caught.value)

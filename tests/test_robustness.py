"""What a network with temporal modules must live through, on one small architecture of every family."""

import copy
import io
import json
import pickle
import socket
from hashlib import sha256
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES, T, build, meta, same
from shapes import meta_run
from timm.layers import DropPath, convert_sync_batchnorm
from timm.models._manipulate import group_with_matcher
from timm.utils import ModelEmaV3, reparameterize_model
from timm.utils.model import freeze
from torch import nn
from torch.ao.quantization import fuse_modules

import temporal_excite as te


def test_every_family_of_timm_has_a_member():
    kinds = json.loads((Path(__file__).parent / "timm_sites.json").read_text())
    with_sites = {family for families in kinds.values() for family, n in families.items() if any(n.values())}
    assert with_sites <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_survives(family):
    """Copies, files, averages, channels_last, autocast, synchronised batch norms, another head."""
    model, x = build(family)
    expected = model(x)
    assert not same(expected, expected.mean(0, keepdim=True).expand_as(expected))  # the frames differ
    paths = [s.layer for s in te.sites(model)]

    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    twins["EMA"] = ModelEmaV3(model).module
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twins["state dict"] = te.inject(te.eject(copy.deepcopy(model)), "shift", T)
    assert not same(twins["state dict"](x), expected, 1e-4)
    twins["state dict"].load_state_dict(torch.load(file, weights_only=True))
    for what, twin in twins.items():
        assert [s.layer for s in te.sites(twin)] == paths, what
        assert same(twin(x), expected), what
    # the copy runs its own modules
    for site in te.sites(twins["deepcopy"]):
        for p in site.module.parameters():
            p.zero_()
    assert not same(twins["deepcopy"](x), expected, 1e-4) and same(model(x), expected)
    del twins

    assert same(
        model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected
    )
    model.to(memory_format=torch.contiguous_format)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.shape == expected.shape and half.isfinite().all()
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    if len(te.sites(converted)) == len(paths):
        assert same(converted(x), expected)
    else:  # a module on a batch norm itself went with it, and that is said
        with pytest.raises(RuntimeError, match="convert batch norms before injecting"):
            converted(x)
    model.reset_classifier(7)
    assert model(x).shape == (2 * T, 7) and [s.layer for s in te.sites(model)] == paths


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reparameterize(family):
    """Either every site survives with the same output, or an error comes before anything is lost."""
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(m, method) for m in meta(family).modules() for method in methods):
        pytest.skip("nothing to re-parameterise in this architecture")
    model, x = build(family)
    expected = model(x)
    n = len(te.sites(model))
    try:
        fused = reparameterize_model(model)
    except RuntimeError as error:
        assert "eject(model) first" in str(error)
        assert len(te.sites(model)) == n and same(model(x), expected)
        fused = te.inject(reparameterize_model(te.eject(model)), "shift", T)  # the other order works
        fused(x)
    else:
        calls = []
        for site in te.sites(fused):
            site.module.register_forward_hook(lambda *_: calls.append(1))
        output = fused(x)
        assert len(te.sites(fused)) == len(calls) == n
        assert same(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_group_matcher(family):
    """Layer decay and freezing by groups: a module falls into its block's group."""
    model = te.inject(meta(family), "shift", T)
    if not hasattr(model, "group_matcher"):
        pytest.skip("timm gives this architecture no group_matcher")
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=False), reverse=True)
    own = dict(model.named_parameters())
    for site in te.sites(model):
        block = model.get_submodule(site.block)
        mates = {groups[f"{site.block}.{n}"] for n, _ in block.named_parameters() if "temporal" not in n}
        module = {groups[n] for n, p in own.items() if any(p is q for q in site.module.parameters())}
        assert module <= mates, site.block


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_grad_checkpointing(family):
    model, x = build(family)
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        pytest.skip("timm gives this architecture no gradient checkpointing")
    grads = []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Dropout | DropPath):
                m.eval()
        torch.manual_seed(0)  # some networks call F.dropout
        model(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("temporal" in n for n in grads[0])
    for name in grads[0]:
        assert same(grads[0][name], grads[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_only(family, monkeypatch):
    size = FAMILIES[family].size
    try:
        plain = meta(family, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError):
        pytest.skip("timm gives this architecture no features_only")
    shapes = [f.shape for f in meta_run(plain, size)]

    models = {}
    wrapper = type(plain)
    if wrapper.__module__ == "timm.models._features":  # else a class of its own, around no model

        def init(self, model, *args, original=wrapper.__init__, **kwargs):
            original(self, te.inject(model, "shift", T), *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(wrapper, "__init__", init)
            models["injected before"] = meta(family, features_only=True)
    models["injected after"] = te.inject(plain, "shift", T)
    n = {len(te.sites(model)) for model in models.values()}
    assert len(n) == 1
    stages = [[site.stage for site in te.sites(model)] for model in models.values()]
    assert stages[0] == stages[-1]
    for order, model in models.items():
        calls = []
        for site in te.sites(model):
            site.module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert shapes == [f.shape for f in meta_run(model, size)], order
        # the last features may come before the last block
        assert max(1, len(te.sites(model)) - 1) <= len(calls) <= len(te.sites(model)), order


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compile(family):
    """No graph break. That is Dynamo's part; the compilers after it see the same operators with and without
    modules, so that the eager backend stands for all of them here, and AOTAutograd in one test below."""
    model, x = build(family)
    torch.compiler.reset()
    assert same(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export(family):
    model, x = build(family)
    # T frames of any number of clips
    frames = T * torch.export.Dim("clips", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: frames},)).module()
    for clips in (x, x[:T], torch.cat([x, x.flip(0), x])):
        assert same(program(clips), model(clips))


@pytest.mark.parametrize(
    ("family", "module"),
    [
        *(("resnet", "action"), ("mobilenetv4", "shift"), ("convnext", "action")),
        *(("densenet", "tsm"), ("mambaout", "shift")),
    ],
)
def test_compile_for_training(family, module):
    """The graph of the backward pass too."""
    model, x = build(family, module)
    torch.compiler.reset()
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("inject_into", ["model", "compiled"])
@torch.no_grad()
def test_injection_after_the_first_compiled_call_is_not_ignored(inject_into):
    model, x = build("byobnet", None)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = compiled(x)
    te.inject(model if inject_into == "model" else compiled, "tsm", T)
    assert te.sites(model)
    changed = compiled(x)
    assert same(changed, model(x)) and not same(changed, plain)
    te.eject(model)
    assert same(compiled(x), plain)


def test_converting_the_batch_norm_a_module_follows_is_an_error():
    model = te.inject(timm.create_model("resnet18").eval(), "tsm", T, "loc4")
    x = torch.randn(T, 3, 32, 32)
    model(x)
    freeze(model, "layer1")  # makes frozen batch norms, without the hooks
    with pytest.raises(RuntimeError, match="took the place of the batch norm 'bn2'"):
        model(x)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # now the others too
    keys = set(timm.create_model("resnet18").state_dict())
    assert not te.sites(model)
    with pytest.raises(RuntimeError, match=r"what is left of temporal modules .*eject\(model\) first"):
        te.inject(model, "tsm", T)
    te.inject(te.eject(model), "tsm", T)(x)
    assert set(model.state_dict()) <= keys
    with pytest.raises(RuntimeError, match="nothing to eject"):
        te.eject(te.eject(model))


@pytest.mark.parametrize("module", ["tsm", "action", "te"])
def test_fused_layers_run_their_module_once(module):
    model = te.inject(timm.create_model("resnet18", num_classes=5), module, n_segment=T).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bn" in name:
                parameter.uniform_(0.5, 1.5)
    layers = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    pairs = [[f"{name}.conv{k}", f"{name}.bn{k}"] for name in layers for k in (1, 2)]
    fused, x = fuse_modules(model, pairs), torch.randn(T, 3, 32, 32)
    assert [site.layer for site in te.sites(fused)] == [site.layer for site in te.sites(model)]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
    assert not te.sites(te.eject(fused))


def test_one_frame_acts_as_an_image_model():
    model, x = build("resnet", None)
    te.inject(model, "shift", 1)
    with torch.no_grad():
        assert same(model(x)[:1], model(x[:1]))
        te.set_n_segment(model, 2)
        assert not same(model(x)[:1], te.set_n_segment(model, 1)(x)[:1])


def test_batch_not_divisible():
    model, x = build("resnet")
    te.set_n_segment(model, 3)
    with pytest.raises(ValueError, match=r"4 frames are not a multiple of n_segment=3"):
        model(x)


def _train(rank, port, families):
    """On one of two processes: every gradient is that of one process with both processes' clips."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for number, family in enumerate(families):
        model, x = build(family, "action" if family == "byobnet" else "shift")
        alone = copy.deepcopy(model.train())
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)

        def loss(network, clips, x=x):
            torch.manual_seed(clips)  # dropout, too
            return network(torch.randn_like(x)).square().mean()

        loss(parallel, rank).backward()
        own = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
        digest = torch.frombuffer(bytearray(sha256(own.numpy()).digest()), dtype=torch.uint8)
        other = digest.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(digest, other), f"{family}: the processes differ"
        if number % 2 == rank:  # one of the two is enough to tell
            for clips in range(2):
                loss(alone, clips).backward()
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert same(p.grad, q.grad / 2, 1e-5), f"{family}: {name}"
        assert all(p.grad.any() for s in te.sites(model) for p in s.module.parameters()), family
        loss(parallel, rank)  # fails where a parameter got no gradient
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_ddp_on_two_processes(part):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_train, (port, list(FAMILIES)[part::2]), nprocs=2)

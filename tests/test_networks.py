"""What a network with several modules a block must survive: the list that holds for every injected model."""

import copy
import io
import os
import pickle

import pytest
import torch
from test_modules import randomise
from test_tea import RES2NET, RESNET, frames, network
from timm.utils import ModelEmaV3
from torch import nn

import temporal_excite as te

T = 4
CASES = {
    "res2net-tea": (RES2NET, "tea", {}),
    "res2net-2plus1d_me": (RES2NET, "2plus1d_me", {}),
    "resnet-tea": (RESNET, "tea", {}),
    "resnet-2plus1d-conv": (RESNET, "2plus1d", {"conv": "conv"}),
    "resnet-2plus1d_se": (RESNET, "2plus1d_se", {}),
    "resnet-tefe": (RESNET, "tefe", {"te": (1, 1, 1, 0), "fe": (1, 1, 0, 1)}),
}


@pytest.fixture(params=CASES)
def model(request) -> nn.Module:
    block, name, kwargs = CASES[request.param]
    injected = te.inject(network(block, (2, 2, 1, 1)), name, T, **kwargs)
    for site in te.sites(injected):  # FE starts as nothing at all
        for conv in site.module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.05)
    return injected.eval()


def test_copies(model):
    x = frames()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        randomise(te.sites(model)[0].module)  # a copy runs its own modules
        assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
        model.load_state_dict(twin.state_dict())


def test_state_dict_round_trip(model):
    x, file = frames(), io.BytesIO()
    expected = model(x)
    torch.save(model.state_dict(), file)
    file.seek(0)
    for p in model.parameters():
        nn.init.normal_(p)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(x), expected)


def test_ema(model):
    ema = ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(ema.module.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update(model)
    for key, value in ema.module.named_parameters():
        torch.testing.assert_close(value, before[key] + 0.5)
    te.eject(ema.module)
    assert not te.sites(ema.module) and te.sites(model)


def test_training_without_memory(model):
    model.to("meta").train()(frames().to("meta")).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_clips(model, training):
    x = frames(0).requires_grad_()
    y = model.train(training)(x)
    assert y.shape == (0, *model.eval()(frames()).shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape


def features(clips: int) -> torch.Tensor:
    """Input of the first stage."""
    return torch.randn(clips * T, 64, 6, 6, generator=torch.Generator().manual_seed(7))


def test_compile(model):
    stage, x = model.layer1, features(1)
    compiled = torch.compile(stage, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stage(x))


def test_export_with_dynamic_batch(model):
    """A stage holds every kind of site; the rest of the network would add nothing but time."""
    stage = model.layer1
    batch = T * torch.export.Dim("clips", min=1, max=128)
    program = torch.export.export(stage, (features(2),), dynamic_shapes=({0: batch},)).module()
    for clips in (1, 3, 120):  # where operations go by size, the last is large
        x = features(clips)
        torch.testing.assert_close(program(x), stage(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    x = frames()
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


def test_channels_last(model):
    x = frames()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_half_and_double(model):
    x = frames()
    expected = model(x)
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype is torch.bfloat16
    model.double()
    assert (model(x.double()) - expected).norm() < 0.1 * expected.norm()


def test_segments(model):
    """T = 1 is an image model; another T, unless TE forbids it, is kept by all modules."""
    if any(isinstance(site.module, te.TEModule) for site in te.sites(model)):
        return
    te.set_n_segment(model, 1)
    x = frames()
    torch.testing.assert_close(model(x), torch.cat([model(frame[None]) for frame in x]), rtol=1e-4, atol=1e-4)
    te.set_n_segment(model, 2)
    torch.testing.assert_close(model(x), torch.cat([model(x[:2]), model(x[2:])]), rtol=1e-4, atol=1e-4)


def test_frames_meet_within_clips_only(model):
    """The output of a clip depends on all near frames of the clip and on no other clip."""
    x = frames(2).requires_grad_()
    model(x)[:T].square().sum().backward()
    reach = x.grad.abs().amax((1, 2, 3))
    assert (reach[:T] > 0).all() and (reach[T:] == 0).all()


def test_data_parallel(model, tmp_path):
    """DDP without find_unused_parameters: every parameter takes part in every step."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model.train())
        for _ in range(2):
            parallel(frames(2)).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())

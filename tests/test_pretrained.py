"""What docs/pretrained.md says."""

import pytest
import timm
import torch

import temporal_excite as te


@pytest.mark.parametrize("name", ["resnet10t", "mixnet_s", "test_convnext"])
def test_plain_weights_load_before_or_after(name):
    plain = timm.create_model(name, num_classes=3).eval()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    after = te.inject(timm.create_model(name, num_classes=3).eval(), "shift", 2)
    missing, unexpected = after.load_state_dict(state, strict=False)
    assert not unexpected and missing and all("temporal." in key for key in missing)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(after(x), te.inject(plain, "shift", 2)(x))
    te.inject(timm.create_model(name, num_classes=3), "shift", 2).load_state_dict(after.state_dict())


def test_released_action_scales_by_about_4_5_and_identity_start_by_1():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    x = torch.randn(4, 3, 64, 64)
    seen = []

    def keep(module, args, output):
        if not isinstance(module.shift, torch.nn.Identity):
            seen.append((output.norm() / module.shift(args[0]).norm()).item())

    with torch.no_grad():
        expected = model(x)
        for site in te.sites(te.inject(model, "action", 2)):
            site.module.register_forward_hook(keep)
        model(x)
        assert seen and all(4 < ratio < 5 for ratio in seen)
        te.inject(te.eject(model), "action", 2, identity_start=True)
        torch.testing.assert_close(model(x), expected)

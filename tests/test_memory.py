"""Memory that results share one after the other, and never at the same time."""

import copy
import threading

import pytest
import timm
import torch

import temporal_excite as te
from temporal_excite import memory

SHAPE = (8, 32, 56, 56)  # 3.2 MB


def fresh(shape=SHAPE, dtype=torch.float32, layout=torch.contiguous_format):
    return memory.empty_like(torch.empty(shape, dtype=dtype), memory_format=layout)


def kept_addresses():
    kept = (piece.memory for piece in memory._spare.pieces)
    return {torch.frombuffer(m, dtype=torch.uint8).data_ptr() for m in kept if m}


@pytest.mark.parametrize("hold", [lambda y: y, lambda y: y[0, 1:], lambda y: y.numpy(), lambda y: y.detach()])
def test_memory_is_used_again_only_when_nothing_holds_it(hold):
    first = fresh()
    address = first.data_ptr()
    held = hold(first)
    del first
    assert fresh().data_ptr() != address
    del held
    assert fresh().data_ptr() == address


def test_no_more_than_four_pieces_are_kept():
    results = [fresh() for _ in range(5)]
    addresses = {y.data_ptr() for y in results}
    assert len(addresses) == 5
    del results
    again = [fresh() for _ in range(4)]
    assert {y.data_ptr() for y in again} == kept_addresses()
    assert {y.data_ptr() for y in again} < addresses


def test_shape_dtype_and_layout():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = fresh(dtype=dtype, layout=torch.channels_last)
        assert y.shape == SHAPE and y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.untyped_storage().nbytes() == y.nbytes and not y._is_view()
        del y
    assert fresh().is_contiguous()


def test_little_and_much_is_not_kept():
    for shape in ((1, 1, 2, 2), (8, 1024, 56, 56)):
        y = fresh(shape)
        address = y.data_ptr()
        del y
        assert address not in kept_addresses()


def test_each_thread_has_its_own():
    mine = fresh()
    found = []
    thread = threading.Thread(target=lambda: found.append(fresh().data_ptr()))
    thread.start()
    thread.join()
    assert found[0] != mine.data_ptr()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["tsm", "action", "ste", "tea_me"])
def test_what_a_hook_holds_stays_as_it_is(name, training):
    torch.manual_seed(0)
    model = te.inject(timm.create_model("resnet18"), name).train(training)
    held, copies = [], []

    def hold(module, args, output):
        held.append(output)
        copies.append(output.clone())

    for site in te.sites(model):
        site.module.register_forward_hook(hold)
    for _ in range(2):
        with torch.set_grad_enabled(training):
            y = model(torch.randn(8, 3, 112, 112))
        if training:
            y.sum().backward()
    assert len(held) == 16
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_results_with_a_gradient_only_where_not_saved():
    x = torch.empty(SHAPE)
    with memory.not_saved():
        assert memory.result_like(x, memory_format=torch.channels_last).data_ptr() in kept_addresses()
    assert memory.result_like(x, memory_format=torch.channels_last).data_ptr() not in kept_addresses()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_stays_as_it_is(layout):
    torch.manual_seed(0)
    module = te.ActionModule(96, 8).train()  # of more than 8 MiB
    gradients, copies = [], []
    for _ in range(6):
        x = torch.randn(8, 96, 56, 56).contiguous(memory_format=layout).requires_grad_()
        module(x).square().sum().backward()
        gradients.append(x.grad)
        copies.append(x.grad.clone())
    addresses = {g.data_ptr() for g in gradients}
    assert len(addresses) == 6 and addresses & kept_addresses()
    assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True))


def test_without_gradients_as_with_them():
    torch.manual_seed(0)
    model = te.inject(timm.create_model("resnet18"), "action").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(16, 3, 112, 112)
    expected = copy.deepcopy(model)(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()

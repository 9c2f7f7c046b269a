"""docs/online.md: its code runs, and its bytes are those of the states."""

import copy
import queue
import re
import threading
from pathlib import Path

import families
import pytest
import torch

import temporal_excite as te
from temporal_excite.modules import MotionExcitation

PAGE = (Path(__file__).parent.parent / "docs" / "online.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """After the blocks in front of the exports."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("online"))
        for block in BLOCKS[:3]:
            exec(block, names)
    return names


def test_first_examples(names):
    assert names["consensus"].shape == (3, 27)
    assert names["state"]["frames"].tolist() == [0, 1]
    assert names["scores"].sum() == pytest.approx(1, abs=1e-5)


def test_server(names):
    """Clients in threads, each with a video of its own length; every answer is that of a stream alone."""
    assert len(block_with("def serve").split("\n\n\n")[1].splitlines()) == 15
    torch.manual_seed(0)
    model = copy.deepcopy(names["model"]).double()
    videos = {client: torch.rand(n, 3, 64, 64).double() for client, n in (("a", 3), ("b", 5), (3, 4))}
    answers: dict = {client: [] for client in videos}
    stream, sizes = te.Stream(model, window=2), []
    step = stream.step

    def counted(frames, state):
        sizes.append(len(frames))
        return step(frames, state)

    def work(client):
        start.wait()
        for frame in videos[client]:
            answers[client].append(names["ask"](client, frame))

    stream.step = counted
    names["requests"] = queue.Queue()
    threading.Thread(target=names["serve"], args=(stream, names["requests"]), daemon=True).start()
    start = threading.Barrier(len(videos))
    threads = [threading.Thread(target=work, args=(client,)) for client in videos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(sizes) == 12 and max(sizes) > 1
    for client, video in videos.items():
        alone = te.Stream(model, window=2)
        want = torch.stack([alone(frame[None]).consensus[0].softmax(0) for frame in video])
        torch.testing.assert_close(torch.stack(answers[client]), want, rtol=1e-9, atol=1e-12)
    assert (answers["a"][0] - answers["b"][0]).abs().max() > 1e-6


@pytest.mark.slow
def test_export_and_onnx(tmp_path, monkeypatch):
    """The page's lines on a smaller network."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model, _ = families.build("resnet", "action", causal=True)
    model.default_cfg = {"input_size": (3, 224, 224)}
    names = {"torch": torch, "stream": te.Stream(model)}
    exec(block_with("torch.export") + block_with("torch.onnx"), names)
    frame, stream = names["frame"], names["stream"]
    want, state = stream.step(frame, stream.initial_state(1))
    torch.testing.assert_close(names["logits"], want, rtol=1e-3, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    given = {key: torch.zeros_like(value).numpy() for key, value in state.items()}
    outputs = [output.name for output in session.get_outputs()]
    assert outputs == ["logits", *(f"next.{key}" for key in state)]
    logits = session.run(["logits"], {"image": frame.numpy(), **given})[0]
    torch.testing.assert_close(torch.from_numpy(logits), want, rtol=1e-3, atol=1e-4)


C, H, W, T = 32, 6, 5, 8
MAP, R = H * W, C // 16
ACTION = 8 * C * MAP
BYTES = {
    "tsm": (te.TemporalShift(C, T, causal=True), 4 * (C // 8) * MAP),
    "shift": (te.TemporalConv(C, T, causal=True), 8 * C * MAP),
    "te.STE": (te.STE(C, T, causal=True), 8 * MAP),
    "te.CE": (te.CE(C, T, causal=True), 8 * R),
    "te.ME": (te.ME(C, T, causal=True), 4 * R),
    "TEA's ME": (MotionExcitation(C, T, causal=True), 4 * R),
    "action": (te.ActionModule(C, T, causal=True), ACTION + 8 * MAP + 12 * R),
    "action, no shift": (te.ActionModule(C, T, shift=False, causal=True), 8 * MAP + 12 * R),
    "TEA's MTA": (te.MTA(C, T, causal=True), 8 * C * MAP),
    "TE": (te.TEModule(C, T, causal=True), 4 * (T - 1) * C + 8 * (C // 4) + 8 * C * MAP),
    "FE": (te.FEModule(C, T, 48, stride=2, causal=True), 16 * 48 * (H // 2) * ((W + 1) // 2)),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name):
    module, wanted = BYTES[name]
    stream = te.Stream(torch.nn.Sequential(torch.nn.Conv2d(3, C, 1), module).eval())
    state = stream.initial_state(1, (3, H, W))
    assert sum(v.nbytes for k, v in state.items() if k not in ("frames", "consensus")) == wanted
    shown = PAGE.split("| module | keeps | bytes |")[1].split("\n\n")[0]
    assert all(part in shown for part in name.removesuffix(", no shift").split(", "))

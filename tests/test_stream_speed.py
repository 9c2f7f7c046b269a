"""benchmarks/stream.py: that it steps, and what it reports."""

import json
import shutil

import pytest
import stream
import test_causal
import timm
from test_stream import frames, relative, run

import temporal_excite as te

OPTIONS = ["--backbone=resnet10t", "--modules", "tsm", "action", "--size=32", "--threads=1"]


def test_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    arguments = [*OPTIONS, "--batch", "1", "3", "--repeats=4", f"--json={path}"]
    seen: list[tuple[str, int, int]] = []
    original = te.Stream.step

    def step(self, frames, state):
        kind = te.sites(self.model)[0].kind
        seen.append((kind, len(frames), int(state["frames"][0])))
        return original(self, frames, state)

    monkeypatch.setattr(te.Stream, "step", step)
    monkeypatch.setattr("sys.argv", ["stream.py", *arguments])
    stream.main()
    # two steps to warm up each network, then one of each in turn, every one from the state before
    warm = [(kind, t) for kind in ("TemporalShift", "ActionModule") for t in (0, 1)]
    timed = [(kind, t) for t in (2, 3, 4, 5) for kind in ("TemporalShift", "ActionModule")]
    assert seen == [(kind, batch, t) for batch in (1, 3) for kind, t in warm + timed]

    rows = json.loads(path.read_text())["rows"]
    networks = ["plain", "tsm", "action"]
    assert [(r["streams"], r["network"]) for r in rows] == [(b, n) for b in (1, 3) for n in networks]
    for r in rows:
        assert 0 < r["p50_ms"] <= r["p95_ms"] and r["ratio"] > 0
        assert r["streams_per_s"] == pytest.approx(r["streams"] * 1000 / r["p50_ms"])
        assert r["ratio"] == 1 or r["network"] != "plain"
        assert r["state_bytes"] == state_bytes(r["network"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(rows) and f"{state_bytes('action'):,}" in shown[-1]


def state_bytes(network: str) -> int:
    """Of one stream: what the sites keep, the counter of frames, and the mean of the logits."""
    if network == "plain":
        return 0
    model = te.inject(timm.create_model("resnet10t").eval(), network, causal=True)
    return sum(s.state_bytes for s in te.sites(model, frame_shape=(3, 32, 32))) + 8 + 4 * 1000


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the compiler writes C++")
def test_compiled_ahead():
    """The same values, under the stream's checks."""
    model, _ = test_causal.network("action")
    live, video = te.Stream(model, window=3), frames(2, 4)
    want = run(live, video)
    stream.compile_ahead(live.module, video[0], live.initial_state(2, (3, 32, 32)))
    model.forward = None  # not run any more
    assert relative(run(live, video), want) < 1e-12
    with pytest.raises(ValueError, match="batch and frame size"):
        live.step(video[0][:1], live.initial_state(2, (3, 32, 32)))


def test_wrong_options(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stream.py", *OPTIONS, "--repeats=1"])
    with pytest.raises(SystemExit):
        stream.main()
    assert "--repeats must be at least 2, got 1" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["stream.py", *OPTIONS, "--modules", "tsm", "odd"])
    with pytest.raises(SystemExit):
        stream.main()
    assert "--modules: unknown odd" in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.argv", ["stream.py", "--backbone=mobilenetv2_050", "--modules=tea", "--threads=1"]
    )
    with pytest.raises(ValueError, match="no bottleneck"):
        stream.main()

"""benchmarks/speed.py: the forms it compares with, and that it runs."""

import json

import as_published
import pytest
import speed
import torch

import temporal_excite as te


@pytest.mark.parametrize("paths", [("ste",), ("ce",), ("me",), ("ste", "ce", "me"), None])
@pytest.mark.parametrize("training", [False, True])
def test_published_forms_are_the_modules(paths, training):
    torch.manual_seed(0)
    module = te.TemporalShift(32, 4) if paths is None else te.ActionModule(32, 4, paths=paths)
    module.double().train(training)
    x = torch.randn(8, 32, 6, 5, dtype=torch.float64)
    expected = module(x)
    assert as_published.use_published_forms(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [[], ["--train"]])
def test_prints_a_row_for_each_network(more, tmp_path, monkeypatch, capsys):
    options = ["--backbone=resnet18", "--size=32", "--frames=4", "--modules=tsm,me", "--repeats=1"]
    options += ["--threads=1", "--no-count", f"--json={tmp_path / 'out.json'}", *more]
    monkeypatch.setattr("sys.argv", ["speed.py", *options])
    speed.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [r["network"] for r in rows] == ["plain", "tsm", "tsm as published", "me", "me as published"]
    assert all(r["ratio"] > 0 and r["saved_MiB"] > 0 for r in rows)
    assert "me as published" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["causal", "identity_start"])
def test_forms_that_were_not_published(option):
    module = te.ActionModule(32, 4, **{option: True})
    assert not as_published.use_published_forms(module)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--json=nowhere/out.json", "cannot write nowhere/out.json"),
        ("--plot=nowhere/out.png", "cannot write nowhere/out.png"),
        ("--plot=out.odd", "the ending must be one of .png"),
        ("--repeats=0", "--repeats: must be a whole number of at least 1, got 0"),
        ("--size=-3", "--size: must be a whole number of at least 1, got -3"),
        ("--backbone=odd", "Unknown model (odd)"),
        ("--modules=odd", "unknown module 'odd'"),
        ("--module-args={", "--module-args: invalid"),
    ],
)
def test_wrong_options_end_before_the_measurements(option, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed.py", option])
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        speed.main()
    assert message in capsys.readouterr().err

"""docs/backbones.md says what the library does."""

import importlib.util
import json
from pathlib import Path

import pytest

from temporal_excite.hosts import known_hosts

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("backbones", DOCS / "backbones.py")
backbones = importlib.util.module_from_spec(spec)
spec.loader.exec_module(backbones)


@pytest.mark.parametrize("family", ["vgg", "densenet", "sknet", "rexnet", "efficientvim", "shvit"])
def test_family_has_not_drifted(family):
    kinds = json.loads(backbones.SITES.read_text())
    names = next(list(f[family]) for f in kinds.values() if family in f)
    assert backbones.family_row(family, names) in (DOCS / "backbones.md").read_text(encoding="utf-8")


def test_classes_have_not_drifted():
    page = (DOCS / "backbones.md").read_text(encoding="utf-8")
    for path, host in known_hosts().items():
        assert backbones.class_row(path, host) in page


def test_text_has_not_drifted():
    assert (DOCS / "backbones.md").read_text().endswith(backbones.TAIL)

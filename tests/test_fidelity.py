"""docs/fidelity.md says what is so."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_examples():
    """In a process of its own: one example teaches inject a block class."""
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-m", "doctest", "docs/fidelity.md"], cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout
    assert (root / "docs" / "fidelity.md").read_text().count(">>>") > 15

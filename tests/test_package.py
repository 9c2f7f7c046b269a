import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import temporal_excite as te

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fresh(code):
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_modules_need_no_timm():
    code = "import sys; sys.modules['timm'] = None; from temporal_excite.modules import STE; print(STE(8))"
    assert fresh(code).startswith("STE(")


def test_import_loads_nothing_heavy():
    code = "import timm, sys; old = set(sys.modules); import temporal_excite; print(*set(sys.modules) - old)"
    loaded = {name.partition(".")[0] for name in fresh(code).split()}
    assert "temporal_excite" in loaded
    assert not loaded & {"fvcore", "matplotlib", "av", "pandas", "scipy"}


def test_import_loads_no_video_reader():
    """torchvision only with timm, which needs it; PyAV only when a video is opened."""
    code = "import sys; sys.modules['timm'] = None; import temporal_excite; print(*sys.modules)"
    loaded = set(fresh(code).split())
    assert "temporal_excite" in loaded and not loaded & {"av", "PIL", "torchvision", "torchvision.transforms"}
    loaded = set(fresh("import sys, temporal_excite.video; print(*sys.modules)").split())
    assert "temporal_excite.video" in loaded and "av" not in loaded


def test_public_names():
    assert te.__all__ == sorted(te.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    for name in te.__all__:
        assert (getattr(te, name).__doc__ or "").strip(), f"{name} has no docstring"
    assert (ROOT / "temporal_excite" / "py.typed").exists()


def test_metadata():
    try:
        metadata = importlib.metadata.metadata("temporal-excite")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the tree, not installed")
    assert metadata["Version"] == te.__version__
    assert metadata["License"] == "MIT"
    assert {"plot", "test", "dev", "video", "visual"} <= set(metadata.get_all("Provides-Extra"))


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks[0].splitlines()) == 5  # one of them empty
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (1, 174)
    assert not te.sites(names["model"])


def test_ci_runs_the_commands_of_the_readme():
    """`.ci/run` takes them out of the README, so they cannot drift; what it looks for must be there."""
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [command.rpartition(" && ")[2] for command in commands] == [
        ".venv/bin/python benchmarks/flops.py",
        ".venv/bin/python -m pytest -n auto",
    ]
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep '^python3 -m venv' README.md" in script
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def imported(path):
    """What a file of the package imports: names below the package, and other libraries."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            inner = [part for part in base[1:] if part]
            yield from ["/".join(inner)] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


ROOMS = dict(
    re.findall(
        r"^\| `([\w./]+)` \|.*\| ([^|]+) \|$", (ROOT / "docs" / "architecture.md").read_text(), flags=re.M
    )
)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms(room):
    """Each imports what docs/architecture.md says, and no more."""
    where = ROOT / "temporal_excite" / room
    allowed = re.findall(r"`([\w/]+)", ROOMS[room]) + re.findall("torch|timm|einops|fvcore", ROOMS[room])
    if "all of the above" in ROOMS[room]:
        return
    own = room.strip("/").removesuffix(".py")
    common = {"_text", "_extras", "numpy", "torch", "torchvision", *sys.stdlib_module_names}
    for path in [where] if where.is_file() else where.rglob("*.py"):
        for name in imported(path):
            inside = own == name or name.startswith(f"{own}/")
            known = any(name == one or name.startswith(f"{one}/") for one in allowed)
            assert inside or known or name in common or name in {"av", "PIL", "matplotlib", "timm"}, (
                path.name,
                name,
            )

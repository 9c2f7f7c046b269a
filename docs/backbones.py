# ruff: noqa: E501  (lines of Markdown)
"""Writes docs/backbones.md, the support matrix, from the running library: ``python docs/backbones.py``."""

import json
import sys
from pathlib import Path

import timm

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
SITES = TESTS / "timm_sites.json"
sys.path[:0] = [str(HERE.parent), str(TESTS)]

from shapes import meta_model  # noqa: E402

import temporal_excite as te  # noqa: E402
from temporal_excite.hosts import Host, find_blocks, known_hosts  # noqa: E402

KINDS = {"conv": "Convolutional networks", "plain": "Plain networks", "hybrid": "Convolution and attention"}

INTRO = """# Backbones

What `inject` does with every convolutional network of timm {timm}, and with torchvision's. This page is written
by `python docs/backbones.py`; `pytest tests/test_hosts.py` builds every architecture below on the meta device, injects,
runs it and checks the number of sites, that each fires once and keeps its shape, and that the host's state-dict keys stay.

| kind | architectures | with sites |
|---|---|---|
{counts}

`inject(model, placement="loc1")` puts a module into every block that has a live shortcut; in networks of
which no block has one, into every block; in dense, one-shot-aggregation and inception blocks into every block; in
ResNets whose `layer3` has 23 or more blocks into every second one (`every=1` overrides). A placement the block class lacks is an
error that names the class and the placements it has. `sites(model, skipped=True)` lists the blocks left out
and why. A family is a file of timm; the columns below are of its member with the fewest parameters, the classes of all its members.
"""

TAIL = """
## Limits

- Re-parameterisation (`timm.utils.reparameterize_model`): where it would replace a layer that holds a module, `fuse` raises before
  anything is lost; re-parameterise first and inject then. Blocks that fold in place keep their module;
  timm freezes such a block's parameters, the module's among them.
- A module after a batch norm (`out:bn3` and the like, mostly loc4): convert to SyncBatchNorm before injecting. Converting
  afterwards makes a new layer without the module; the next forward raises, and `eject` clears what is left.
- Layers that are wrapped or replaced, as by adapters (LoRA) on a network's convolutions: do it first and inject then. A
  module goes with the layer it was put on: afterwards the wrapper's own branch would see what the module has not.
- `torch.ao.quantization.fuse_modules` keeps the modules. Passes over `torch.fx` graphs that put other layers in the place of
  convolutions and norms (`torch.fx.experimental.optimization.fuse`, `quantize_fx`) do not see the modules on them and lose
  them without a word: use `torch.export`. Symbolic tracing (torchvision's `create_feature_extractor`) fails where a module
  is on a layer that it traces through: use timm's `features_only=True` or `forward_intermediates`.
- `torch.jit.script` does not take networks with Python hooks; `torch.compile` and `torch.export` do.
- `torch.export` of networks for any number of clips: trace two or more, of one it makes a constant. With
  `dynamic_shapes=({0: 8 * torch.export.Dim("clips", min=1, max=64)},)` the program then takes 1 to 64 clips of 8 frames
  (`pytest tests/test_injection.py -k export`).
- `torch.func`, `torch.vmap` and forward-mode differentiation work (`pytest tests/test_transforms.py`). PyTorch's older vmap,
  behind `torch.autograd.grad(..., is_grads_batched=True)` and `torch.autograd.functional.jacobian(..., vectorize=True)`,
  cannot be told from a plain call: use `torch.func.jacrev`, or `set_fast(model, False)`.
"""


def family_row(family: str, names: list[str]) -> str:
    """The line of one family."""
    models = {name: meta_model(name) for name in names}
    classes = sorted({type(b.module).__name__ for m in models.values() for b in find_blocks(m)})
    name = min(models, key=lambda n: (sum(p.numel() for p in models[n].parameters()), n))
    model = models[name]
    blocks = find_blocks(model)
    if not blocks:
        return f"| {family} | {len(names)} | – | `{name}` | 0 | – | no known block class |"
    points = sorted(set.intersection(*({*b.host.placements} for b in blocks)))
    te.inject(model, "tsm")
    skipped = te.sites(model, skipped=True)
    reasons = sorted({f"{sum(s.reason == t.reason for s in skipped)} {t.reason}" for t in skipped})
    return (
        f"| {family} | {len(names)} | {', '.join(classes)} | `{name}` | {len(te.sites(model))} "
        f"| {', '.join(points)} | {'; '.join(reasons) or '–'} |"
    )


def class_row(path: str, host: Host) -> str:
    """The line of one block class."""
    points = [getattr(host, f"loc{i}") for i in range(1, 5)]
    cells = " | ".join(f"`{p.partition('@')[0]}`".replace("|", "\\|") if p else "–" for p in points)
    return f"| `{path}` | {cells} | {f'`{host.shortcut}`' if host.shortcut else 'always'} | {host.note} |"


def page() -> str:
    """The whole page."""
    kinds = json.loads(SITES.read_text())
    counts = []
    for kind, families in kinds.items():
        sites = [s for f in families.values() for s in f.values()]
        counts.append(f"| {KINDS[kind]} | {len(sites)} | {sum(s > 0 for s in sites)} |")
    lines = [INTRO.format(timm=timm.__version__, counts="\n".join(counts))]
    for kind, families in kinds.items():
        lines += [f"## {KINDS[kind]}", ""]
        lines += ["| family | architectures | block classes | typical | sites | placements | skipped |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [family_row(family, list(names)) for family, names in families.items()]
        lines += [""]
    lines += ["## Block classes", "", "`pre:` is the input of a layer, `out:` its output.", ""]
    lines += ["| class | loc1 | loc2 | loc3 | loc4 | shortcut | note |", "|---|---|---|---|---|---|---|"]
    lines += [class_row(path, host) for path, host in sorted(known_hosts().items())]
    return "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    (HERE / "backbones.md").write_text(page(), encoding="utf-8")

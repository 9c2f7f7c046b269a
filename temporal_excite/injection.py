"""Putting temporal modules into a network and taking them out again."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .hosts import PLACEMENTS, Block, find_blocks
from .modules.registry import module_factory, module_names
from .ops import positive_int

Model = TypeVar("Model", bound=nn.Module)
BlockFilter = str | Callable[[str], bool]

CHILD = "temporal"
"""Name of the child a temporal module becomes, below the layer it precedes or follows."""


@dataclass(frozen=True)
class _Hook:
    """Runs the layer's child ``temporal``.

    Holds no module, so that a deep copy's hook runs the copy's child, and pickles.
    """

    path: str  # of the layer below its block, such as "conv1"
    position: str
    placement: str
    stage: int | None


class _Before(_Hook):
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (layer.temporal(args[0]), *args[1:])  # type: ignore[operator]


class _After(_Hook):
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return layer.temporal(output)  # type: ignore[operator]


@dataclass(frozen=True)
class Insertion:
    """One module to put at one anchor of one block (see :class:`~temporal_excite.hosts.Host`)."""

    block: Block
    anchor: str
    placement: str
    module: nn.Module


@dataclass(frozen=True)
class Site:
    """Where a temporal module sits in a network."""

    block: str
    """Name of the block."""
    layer: str
    """Name of the layer whose input (``pre``) or output (``out``) the module works on."""
    position: str
    """``"pre"`` or ``"out"``."""
    placement: str
    stage: int | None
    """2 to 5 for res2 to res5, from timm's ``feature_info``; None where unknown."""
    module: nn.Module

    @property
    def channels(self) -> int | None:
        """Channels of the tensor at the site, where the module tells."""
        return getattr(self.module, "channels", None)

    @property
    def parameters(self) -> int:
        """Number of parameters the module adds."""
        return sum(p.numel() for p in self.module.parameters())


class SiteList(list[Site]):
    """A list of sites that prints as a table."""

    def __str__(self) -> str:
        header = ("block", "placement", "layer", "stage", "module", "channels", "parameters")
        rows = [
            (
                s.block,
                s.placement,
                f"{s.position}:{s.layer}",
                "-" if s.stage is None else str(s.stage),
                type(s.module).__name__,
                "-" if s.channels is None else str(s.channels),
                f"{s.parameters:,}",
            )
            for s in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        total = sum(s.parameters for s in self)
        return "\n".join([*lines, f"{len(self)} sites, {total:,} added parameters"])


def inject(
    model: Model,
    module: str | Callable[..., nn.Module] = "action",
    n_segment: int = 8,
    placement: str = "loc1",
    *,
    stages: Sequence[int] | None = None,
    include: BlockFilter | None = None,
    exclude: BlockFilter | None = None,
    every: int | None = None,
    **kwargs: Any,
) -> Model:
    """Put a temporal module into every residual, inverted-residual or inception block of a model, in place.

    The model then takes frames ``(N*T, C, H, W)``, clip after clip, and the T frames of a clip see each
    other. Its own parameters, state-dict keys and outputs' shape stay; the modules' parameters appear as
    ``<layer>.temporal.*``. Everything is decided before the model is touched: after an error it is as before.

    Args:
        model: a timm model, or any module that holds known blocks.
        module: a registered name (:func:`~temporal_excite.module_names` lists them), or a class or factory
            called as ``module(channels, n_segment=n_segment, **kwargs)``.
        n_segment: T, the frames of a clip.
        placement: ``"loc1"`` start of the block, ``"loc2"`` after the first convolution, ``"loc3"`` after the
            second, ``"loc4"`` before the addition (ACTION-Net, supplement B).
        stages: only blocks of these stages, e.g. ``(2, 3)`` for res2 and res3 (ACTION-Net, Table 4).
        include: only blocks whose name matches, a regular expression (``re.search``) or a callable.
        exclude: no block whose name matches.
        every: every k-th block of a stage, starting with its first. Default: 2 in networks whose ``layer3``
            holds 23 blocks or more, else 1, as the released TSM and ACTION-Net.
        **kwargs: for the module.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of the wrong type, or a keyword the module does not take.
        ValueError: an unknown name, placement or stage, a value out of range, or a model without a site.
        RuntimeError: the model already holds temporal modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    factory = module_factory(module) if isinstance(module, str) else module
    if not callable(factory):
        raise TypeError(f"module must be one of {module_names()}, a class or a factory, got {module!r}")
    positive_int("n_segment", n_segment)
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; known: {', '.join(PLACEMENTS)}")
    if held := sites(model):
        raise RuntimeError(
            f"{type(model).__name__} already holds {len(held)} temporal modules; eject(model) first"
        )
    insertions = []
    for block in _select(model, stages, include, exclude, every):
        anchor = block.anchor(placement)
        child = factory(block.channels(anchor), n_segment=n_segment, **kwargs)
        insertions.append(Insertion(block, anchor, placement, child))
    for insertion in insertions:
        _attach(insertion)
    _forget_compiled()
    return model


def eject(model: Model) -> Model:
    """Take all temporal modules out again, in place: keys and outputs are the plain model's.

    Returns:
        The same model.

    Raises:
        RuntimeError: the model holds none.
    """
    layers = [layer for _, layer, _ in _hooked(model)]
    if not layers:
        raise RuntimeError(f"{type(model).__name__} holds no temporal modules: nothing to eject")
    for layer in layers:
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
        delattr(layer, CHILD)
    _forget_compiled()
    return model


def sites(model: nn.Module) -> SiteList:
    """Where a model's temporal modules are: a list that prints as a table."""
    found = SiteList()
    for name, layer, hook in _hooked(model):
        found.append(
            Site(
                block=name.removesuffix(hook.path).rstrip("."),
                layer=name,
                position=hook.position,
                placement=hook.placement,
                stage=hook.stage,
                module=layer.get_submodule(CHILD),
            )
        )
    return found


def set_n_segment(model: Model, n_segment: int) -> Model:
    """Set the number of frames of a clip on all temporal modules of a model, in place.

    Returns:
        The same model.

    Raises:
        RuntimeError: the model holds no temporal modules.
        ValueError: ``n_segment`` is below 1.
    """
    positive_int("n_segment", n_segment)
    found = sites(model)
    if not found:
        raise RuntimeError(f"{type(model).__name__} holds no temporal modules; inject(model, ...) first")
    for site in found:
        for module in site.module.modules():
            if hasattr(module, "n_segment"):
                module.n_segment = n_segment  # type: ignore[assignment]
    return model


def _select(
    model: nn.Module,
    stages: Sequence[int] | None,
    include: BlockFilter | None,
    exclude: BlockFilter | None,
    every: int | None,
) -> list[Block]:
    """The blocks an inject call means."""
    if every is not None:
        positive_int("every", every)
    known = find_blocks(model)
    if not known:
        raise ValueError(f"no site in {type(model).__name__}: none of its modules is of a known block class")
    if stages is not None:
        present = sorted({b.stage for b in known if b.stage is not None})
        if unknown := sorted(set(stages) - set(present)):
            raise ValueError(f"stages {unknown} are not among this model's stages {present}")
        known = [b for b in known if b.stage in stages]
    counts: dict[str, int] = {}
    chosen = []
    for block in known:
        parent = block.name.rpartition(".")[0]
        index = counts[parent] = counts.get(parent, -1) + 1
        step = every or _released_step(model, block.name)
        if index % step or not block.live or not _matches(block.name, include, exclude):
            continue
        chosen.append(block)
    if not chosen:
        raise ValueError(
            f"no site in {type(model).__name__}: {len(known)} known blocks, but none is live and passes "
            f"stages={stages}, include={include!r}, exclude={exclude!r}, every={every}"
        )
    return chosen


def _released_step(model: nn.Module, block: str) -> int:
    """2 for a ResNet whose ``layer3`` has 23 or more blocks, as released; else 1."""
    if found := re.match(r"(.*?)layer\d+\.\d+$", block):
        layer3 = model.get_submodule(found[1].rstrip("."))
        return 2 if len(getattr(layer3, "layer3", ())) >= 23 else 1
    return 1


def _matches(name: str, include: BlockFilter | None, exclude: BlockFilter | None) -> bool:
    def hit(rule: BlockFilter) -> bool:
        return bool(re.search(rule, name)) if isinstance(rule, str) else bool(rule(name))

    return (include is None or hit(include)) and (exclude is None or not hit(exclude))


def _attach(insertion: Insertion) -> None:
    block = insertion.block
    path, layer = block.layer(insertion.anchor)
    position = insertion.anchor.partition(":")[0]
    module = insertion.module.train(block.module.training)
    like = next(block.module.parameters(), None)
    if like is not None:
        module = module.to(like.device, like.dtype)
    layer.add_module(CHILD, module)
    if position == "pre":
        layer.register_forward_pre_hook(_Before(path, position, insertion.placement, block.stage))
    else:
        layer.register_forward_hook(_After(path, position, insertion.placement, block.stage))


def _hooked(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Hook]]:
    """(name, layer, hook) of every layer that holds a temporal module."""
    for name, layer in model.named_modules():
        for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
            if isinstance(hook, _Hook):
                yield name, layer, hook


def _forget_compiled() -> None:
    """Make compiled models look again: Dynamo does not guard on hooks and would run the old graph."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

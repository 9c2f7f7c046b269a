"""Putting temporal modules into a network and taking them out again."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import passes, past
from ._text import columns
from .hosts import PLACEMENTS, Block, find_blocks
from .modules.base import TemporalModule, is_causal
from .modules.registry import module_factory, module_names, network_names, network_plan
from .ops import check_model, has_hooks, positive_int
from .recomputation import Input

Model = TypeVar("Model", bound=nn.Module)
BlockFilter = str | Callable[[str], bool]

CHILD = "temporal"
"""Name of the child a temporal module becomes, below the layer it precedes or follows."""

_HOLDER = "_temporal_holder"
"""Attribute of a container of layers: the module above it whose child the temporal module is."""


@dataclass(frozen=True)
class _Place:
    """Where a temporal module is; ``position``, ``placement`` and ``stage`` as in :class:`Site`."""

    path: str  # of the layer below its block, such as "conv1"
    position: str
    placement: str
    stage: int | None
    nhwc: bool  # whether the layer works on (N*T, H, W, C)

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """The layer's child ``temporal``, which takes ``(N*T, C, H, W)``."""
        if self.nhwc:
            inputs = tuple([x.permute(0, 3, 1, 2) for x in inputs])
            return _module_of(layer)(*inputs).permute(0, 2, 3, 1)
        return _module_of(layer)(*inputs)


class _Hook(_Place):
    """Holds no module, so that a deep copy's hook runs the copy's child, and pickles."""


def _module_of(layer: nn.Module) -> Any:
    return getattr(getattr(layer, _HOLDER, layer), CHILD, None)


def _given(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args:
        raise TypeError(
            f"{type(layer).__name__} is called with keyword arguments alone: a temporal module works on the "
            "first positional argument"
        )
    return args


class _Before(_Hook):
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if _hook(layer) is not self:
            return args
        x, *others = _given(layer, args)
        y, module = self.run(layer, x), _module_of(layer)
        if isinstance(module, TemporalModule):  # of a wrapper the same holds as of hooks
            y = passes.as_recomputable(x, y, module)
        return (y, *others)


class _After(_Hook):
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if _hook(layer) is not self:
            return output
        if args:
            passes.note_norm_output(layer, args[0], output)
        y = self.run(layer, output)
        if isinstance(y, Input) and (len(layer._forward_hooks) > 1 or has_hooks(_module_of(layer))):
            y = y.as_subclass(Tensor)  # others may change it
            return y.clone() if y.requires_grad else y  # the module's node may have saved it
        return y


@dataclass(frozen=True)
class _Watch:
    """Raises before a block runs if the batch norm that its module follows was replaced: conversions (to
    SyncBatchNorm, to a frozen norm) make a new layer and drop the old one's hooks."""

    path: str  # of the batch norm below its block

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        layer = block.get_submodule(self.path)
        if _hook(layer) is None:
            raise RuntimeError(
                f"{type(layer).__name__} took the place of the batch norm {self.path!r} in "
                f"{type(block).__name__}, and the temporal module on it no longer runs: "
                "convert batch norms before injecting"
            )


def _refuse_fuse(*_: Any, **__: Any) -> nn.Module:
    """Replaces ``fuse`` on layers that hold a temporal module, or contain a layer that does."""
    raise RuntimeError(
        "re-parameterisation would replace a layer that holds a temporal module and lose the module: "
        "re-parameterise before injecting, or eject(model) first"
    )


class _Around(_Hook):
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if _hook(layer) is not self:
            return output
        return self.run(layer, _given(layer, args)[0], output)


@dataclass(frozen=True)
class _Replaced(_Place):
    """What stood where a :class:`_Replacement` stands. Not a module: its weights are no parameters of the
    network meanwhile, and yet a deep copy or a pickle of the network carries them."""

    layer: nn.Module


class _Replacement(nn.Module):
    """Stands where a layer was; runs its child ``temporal`` and keeps the layer for :func:`eject`."""

    def __init__(self, replaced: _Replaced) -> None:
        super().__init__()
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        return self.replaced.run(self, x)


@dataclass(frozen=True)
class Insertion:
    """One module to put at one anchor of one block (see :class:`~temporal_excite.hosts.Host`).

    Beside ``pre:`` and ``out:`` an anchor may be ``"around:layer"``: the module is called as
    ``module(x, layer(x))``, or ``"instead:layer"``: it takes the layer's place until :func:`eject`.
    """

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
    """Name of the layer whose input (``pre``) or output (``out``) the module works on, or both
    (``around``), or which it replaces (``instead``)."""
    position: str
    """``"pre"``, ``"out"``, ``"around"`` or ``"instead"``."""
    placement: str
    """``"loc1"`` .. ``"loc4"``, or the module's part in a network of several, such as ``"me"``."""
    stage: int | None
    """2 to 5 for res2 to res5, from timm's ``feature_info``; None where unknown."""
    module: nn.Module
    note: str = ""
    """A remark on this site, such as weights that are newly initialised."""
    state_bytes: int | None = None
    """Bytes that one stream keeps here between frames; None unless ``sites`` was given ``frame_shape``."""

    @property
    def channels(self) -> int | None:
        """Channels of the tensor at the site, where the module or its first part tells."""
        return next((m.channels for m in self.module.modules() if hasattr(m, "channels")), None)  # type: ignore[return-value]

    @property
    def kind(self) -> str:
        """Class of the module; of its parts where it is a sequence."""
        parts = self.module if isinstance(self.module, nn.Sequential) else [self.module]
        return " + ".join(type(part).__name__ for part in parts)

    @property
    def parameters(self) -> int:
        """Number of parameters the module adds."""
        return sum(p.numel() for p in self.module.parameters())


class SiteList(list[Site]):
    """A list of sites that prints as a table."""

    def __str__(self) -> str:
        streams = any(s.state_bytes is not None for s in self)
        rows: list[list[object]] = [
            ["block", "placement", "layer", "stage", "module", "channels", "parameters"]
        ]
        for s in self:
            layer, parameters = f"{s.position}:{s.layer}", f"{s.parameters:,}"
            rows.append([s.block, s.placement, layer, s.stage, s.kind, s.channels, parameters])
        if streams:
            for row, cell in zip(rows, ["state bytes", *(f"{s.state_bytes:,}" for s in self)], strict=True):
                row.append(cell)
        total = sum(s.parameters for s in self)
        notes = [
            f"{', '.join(s.layer for s in self if s.note == note)}: {note}"
            for note in dict.fromkeys(s.note for s in self if s.note)
        ]
        summary = f"{len(self)} sites, {total:,} added parameters"
        if streams:
            summary += f", {sum(s.state_bytes or 0 for s in self):,} bytes of state a stream"
        return "\n".join([*columns(rows), *notes, summary])


@dataclass(frozen=True)
class Skipped:
    """A known block without a temporal module."""

    block: str
    kind: str
    """Name of the block's class."""
    stage: int | None
    reason: str


class SkippedList(list[Skipped]):
    """A list of skipped blocks that prints as a table."""

    def __str__(self) -> str:
        rows = [(s.block, s.kind, s.stage, s.reason) for s in self]
        lines = columns([("block", "class", "stage", "reason"), *rows])
        return "\n".join([*lines, f"{len(self)} blocks skipped"])


def inject(
    model: Model,
    module: str | Callable[..., nn.Module] = "action",
    n_segment: int = 8,
    placement: str | None = None,
    *,
    stages: Sequence[int] | None = None,
    include: BlockFilter | None = None,
    exclude: BlockFilter | None = None,
    every: int | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> Model:
    """Put a temporal module into every residual, inverted-residual or inception block of a model, in place.

    The model then takes frames ``(N*T, C, H, W)``, clip after clip, and the T frames of a clip see each
    other. Its own parameters, state-dict keys and output shape stay the same; the modules' parameters are
    added as ``<layer>.temporal.*`` or, where that layer is a container, ``<block>.temporal.*``. Everything is
    checked before the model is changed: after an error it is as before.

    Args:
        model: a timm model, or any module that holds known blocks.
        module: a registered name (:func:`~temporal_excite.module_names` lists them), or a class or factory
            called as ``module(channels, n_segment=n_segment, **kwargs)``; or the name of a network that puts
            several modules at points of its own (:func:`~temporal_excite.network_names`), such as ``"tea"``.
        n_segment: T, the frames of a clip.
        placement: ``"loc1"`` (default) start of the block, ``"loc2"`` after the first convolution, ``"loc3"``
            after the second, ``"loc4"`` before the addition (ACTION-Net, supplement B). Not for networks.
        stages: only blocks of these stages, e.g. ``(2, 3)`` for res2 and res3 (ACTION-Net, Table 4).
        include: only blocks whose name matches, a regular expression (``re.search``) or a callable.
        exclude: no block whose name matches.
        every: every k-th of the known blocks with the same parent, from its first; those without a shortcut
            count too. Default: 2 in networks whose ``layer3`` holds 23 blocks or more, else 1, as the
            released TSM and ACTION-Net; 1 for networks.
        causal: the modules' causal form, whose output at a frame never depends on later ones, for
            :class:`~temporal_excite.Stream`. The keyword goes to the module or network.
        **kwargs: for the module or network.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of the wrong type, a keyword the module does not take, or ``causal`` for a
            module without a causal form.
        ValueError: an unknown name, placement or stage, a value out of range, or a model without a site.
        RuntimeError: the model already holds temporal modules.
    """
    check_model(model)
    plan = network_plan(module) if isinstance(module, str) else None
    if plan is None:
        factory = module_factory(module) if isinstance(module, str) else module
        if not callable(factory):
            names = [*module_names(), *network_names()]
            raise TypeError(f"module must be one of {names}, a class or a factory, got {module!r}")
    positive_int("n_segment", n_segment)
    if placement not in (None, *PLACEMENTS):
        raise ValueError(f"unknown placement {placement!r}; known: {', '.join(PLACEMENTS)}")
    if placement and plan:
        raise ValueError(f"{module!r} chooses its own points: leave placement={placement!r} out")
    _check_plain(model)
    if causal:
        _check_causal(plan or factory, module)
        kwargs["causal"] = True
    if plan:
        blocks = _select(model, stages, include, exclude, 1 if every is None else every)
        insertions = list(plan(blocks, n_segment, **kwargs))
        if not insertions:
            raise ValueError(f"{module!r} has no site in {type(model).__name__}: its plan gave no insertion")
    else:
        insertions = []
        for block in _select(model, stages, include, exclude, every):
            anchor = block.anchor(placement or "loc1")
            child = factory(block.channels(anchor), n_segment=n_segment, **kwargs)
            insertions.append(Insertion(block, anchor, placement or "loc1", child))
    _check_insertions(insertions, module, causal)
    ready = [_prepared(insertion) for insertion in insertions]  # all, before the first is attached
    for insertion in ready:
        _attach(model, insertion)
    _forget_compiled()
    return model


def eject(model: Model) -> Model:
    """Remove all temporal modules, in place: keys and outputs are the plain model's again. What is left of
    modules whose layers have been replaced is removed too.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the model holds none.
    """
    check_model(model)
    held, watched = list(_held(model)), _watched(model)
    if not held and not watched:
        raise RuntimeError(f"{type(model).__name__} holds no temporal modules: nothing to eject")
    layers = [*(layer for _, layer, _ in held), *watched]
    children = {id(child) for layer in layers if (child := _module_of(layer)) is not None}
    originals = {
        name: _to_like(place.layer.train(layer.training), layer)
        for name, layer, place in held
        if isinstance(place, _Replaced)
    }
    for name, original in originals.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, original)
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook | _Watch)]:
                del hooks[key]
        module.__dict__.pop(_HOLDER, None)
        if id(getattr(module, CHILD, None)) in children:
            delattr(module, CHILD)
        if module.__dict__.get("fuse") is _refuse_fuse:
            del module.fuse
        if isinstance(module._modules, _Children):
            module.__dict__["_modules"] = type(nn.Module()._modules)(module._modules)
    _forget_compiled()
    return model


@overload
def sites(
    model: nn.Module, skipped: Literal[False] = False, *, frame_shape: Sequence[int] | None = None
) -> SiteList: ...
@overload
def sites(model: nn.Module, skipped: Literal[True]) -> SkippedList: ...
def sites(
    model: nn.Module, skipped: bool = False, *, frame_shape: Sequence[int] | None = None
) -> SiteList | SkippedList:
    """Where a model's temporal modules are: a list that prints as a table.

    Args:
        model: the model.
        skipped: list the blocks without a module instead, each with the reason.
        frame_shape: ``(3, H, W)``, the size of a stream's frames: also tell the bytes of state that a
            :class:`~temporal_excite.Stream` keeps at each site, for each stream. The model must be causal and
            in eval mode; it is run on one frame.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: with ``frame_shape``, a two-sided module or a shape that is not ``(3, H, W)``.
        RuntimeError: with ``frame_shape``, a model in training mode.
    """
    check_model(model)
    if skipped:
        if frame_shape is not None:
            raise ValueError("skipped blocks have no state: leave frame_shape out, or skipped=True")
        return _skipped(model)
    found = SiteList()
    for name, layer, place in _held(model):
        note = ""
        if isinstance(place, _Replaced):
            note = f"replaces {type(place.layer).__name__}; these weights start anew"
        found.append(
            Site(
                block=name.removesuffix(place.path).rstrip("."),
                layer=name,
                position=place.position,
                placement=place.placement,
                stage=place.stage,
                module=_module_of(layer),
                note=note,
            )
        )
    return found if frame_shape is None else _with_state_bytes(model, found, frame_shape)


def _with_state_bytes(model: nn.Module, found: SiteList, frame_shape: Sequence[int]) -> SiteList:
    for site in found:
        if not is_causal(site.module):
            raise ValueError(f"{site.kind} at {site.layer} is two-sided: it keeps no state between frames")
    step, _ = past.rehearse(model, past.blank_frame(model, frame_shape))
    kept: dict[nn.Module, int] = {}
    for key, module in step.owners.items():
        kept[module] = kept.get(module, 0) + step.left[key].nbytes
    return SiteList(
        replace(site, state_bytes=sum(kept.get(m, 0) for m in site.module.modules())) for site in found
    )


def set_n_segment(model: Model, n_segment: int) -> Model:
    """Set the number of frames of a clip on all temporal modules of a model, in place.

    Returns:
        The same model.

    Raises:
        RuntimeError: the model holds no temporal modules.
        TypeError: ``n_segment`` is not an int.
        ValueError: ``n_segment`` is below 1, or the size of a module's weights depends on T
            (:class:`~temporal_excite.TEModule`); no module is changed then.
    """
    positive_int("n_segment", n_segment)
    found = sites(model)
    if not found:
        raise RuntimeError(f"{type(model).__name__} holds no temporal modules; inject(model, ...) first")
    modules = [m for site in found for m in site.module.modules() if hasattr(m, "n_segment")]
    for module in modules:
        if isinstance(module, TemporalModule):
            module.check_n_segment(n_segment)
    before = []
    try:
        for module in modules:
            before.append((module, module.n_segment))
            module.n_segment = n_segment  # type: ignore[assignment]
    except Exception:  # of a setter in a module that is not ours
        for module, value in before[:-1]:
            module.n_segment = value
        raise
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
    if stages is not None:
        if isinstance(stages, Iterable):
            stages = tuple(stages)
        if not (isinstance(stages, tuple) and all(isinstance(stage, int) for stage in stages)):
            raise TypeError(f"stages must be numbers such as (2, 3), got {stages!r}")
    for name, rule in (("include", include), ("exclude", exclude)):
        if not (rule is None or isinstance(rule, str) or callable(rule)):
            raise TypeError(f"{name} must be a regular expression or a callable, got {rule!r}")
        if isinstance(rule, str):
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(f"{name}={rule!r} is no regular expression: {error}") from error
    known = find_blocks(model)
    if not known:
        raise ValueError(f"no site in {type(model).__name__}: none of its modules is of a known block class")
    any_shortcut = any(block.has_shortcut for block in known)
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
        if index % step or _unsuitable(block, any_shortcut):
            continue
        if not _matches(block.name, include, exclude):
            continue
        chosen.append(block)
    if not chosen:
        raise ValueError(
            f"no site in {type(model).__name__}: {len(known)} known blocks, but none that takes a module "
            f"passes stages={stages}, include={include!r}, exclude={exclude!r}, every={every}"
        )
    return chosen


def _unsuitable(block: Block, any_shortcut: bool) -> str | None:
    """Why a block never takes a module, in a network where any block has a shortcut or none; None: it may."""
    if block.on_tokens:
        return "works on tokens (B, N, C), not on feature maps"
    # A network without any shortcut has its blocks' starts all the same
    return "has no shortcut" if any_shortcut and not block.has_shortcut else None


def _released_step(model: nn.Module, block: str) -> int:
    """2 for a ResNet whose ``layer3`` has 23 or more blocks, as released; else 1."""
    # features_only=True flattens names: body.layer3 becomes body_layer3
    if found := re.fullmatch(r"(.*layer)\d+\.\d+", block):
        parent, _, layer3 = f"{found[1]}3".rpartition(".")
        return 2 if len(getattr(model.get_submodule(parent), layer3, ())) >= 23 else 1
    return 1


def _matches(name: str, include: BlockFilter | None, exclude: BlockFilter | None) -> bool:
    def hit(rule: BlockFilter) -> bool:
        return bool(re.search(rule, name)) if isinstance(rule, str) else bool(rule(name))

    return (include is None or hit(include)) and (exclude is None or not hit(exclude))


def _skipped(model: nn.Module) -> SkippedList:
    """The known blocks without a module, each with the reason."""
    taken = {site.block for site in sites(model)}
    known = find_blocks(model)
    any_shortcut = any(block.has_shortcut for block in known)
    otherwise = "left out by every, stages, include or exclude" if taken else "nothing injected"
    return SkippedList(
        Skipped(b.name, type(b.module).__name__, b.stage, _unsuitable(b, any_shortcut) or otherwise)
        for b in known
        if b.name not in taken
    )


def _check_plain(model: nn.Module) -> None:
    """Raise if the model holds temporal modules, or what is left of them."""
    if held := sites(model):
        raise RuntimeError(
            f"{type(model).__name__} already holds {len(held)} temporal modules; eject(model) first"
        )
    if _watched(model):
        raise RuntimeError(
            f"{type(model).__name__} holds what is left of temporal modules whose batch norms were replaced; "
            "eject(model) first"
        )


def _check_causal(factory: Callable[..., Any], module: Any) -> None:
    """Raise unless a factory of modules, or a network's plan, takes the keyword ``causal``."""
    parameters = inspect.signature(factory).parameters.values()
    if not any(p.name == "causal" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"{module!r} has no causal form: it takes no keyword causal")


def _check_insertions(insertions: Iterable[Insertion], module: Any, causal: bool) -> None:
    """Raise unless every insertion has a place of its own and a module of the kind asked for."""
    holders: set[nn.Module] = set()
    modules: set[nn.Module] = set()
    for insertion in insertions:
        if not isinstance(insertion, Insertion):
            raise TypeError(f"the plan of {module!r} must give Insertion objects, got {insertion!r}")
        holders.add(_check_place(insertion, holders))
        if not isinstance(insertion.module, nn.Module):
            raise TypeError(
                f"{module!r} gave {insertion.module!r} for {insertion.block.name}, not a torch.nn.Module"
            )
        if insertion.module in modules:
            raise ValueError(
                f"{module!r} gave the same {type(insertion.module).__name__} for two places: make a module "
                "for each (they may share parameters)"
            )
        modules.add(insertion.module)
        if causal and not is_causal(insertion.module):
            raise TypeError(
                f"{type(insertion.module).__name__} takes causal=True, but its attribute causal, or a "
                "part's, is not True: derive it from temporal_excite.modules.TemporalModule"
            )


def _check_place(insertion: Insertion, taken: Set[nn.Module]) -> nn.Module:
    """The layer that is to hold the module; raises unless it can."""
    block, anchor = insertion.block, insertion.anchor
    if anchor.partition(":")[0] not in ("pre", "out", "around", "instead"):
        raise ValueError(f"unknown anchor {anchor!r} in {block.name}: use pre:, out:, around: or instead:")
    _, holder = block.holder(block.layer(anchor)[0])
    if hasattr(holder, CHILD):
        raise ValueError(f"{type(holder).__name__} in {block.name} has an attribute {CHILD!r} of its own")
    if holder in taken:
        raise ValueError(f"{type(holder).__name__} in {block.name} cannot hold two modules: make them one")
    return holder


def _prepared(insertion: Insertion) -> Insertion:
    """With the module in the mode, dtype and on the device of its block."""
    host = insertion.block.module
    return replace(insertion, module=_to_like(insertion.module.train(host.training), host))


def _attach(model: nn.Module, insertion: Insertion) -> None:
    block = insertion.block
    path, layer = block.layer(insertion.anchor)
    position = insertion.anchor.partition(":")[0]
    module = insertion.module
    place = (path, position, insertion.placement, block.stage, block.host.nhwc)
    if position == "instead":
        parent, _, name = path.rpartition(".")
        layer = _Replacement(_Replaced(*place, layer)).train(block.module.training)
        setattr(block.module.get_submodule(parent), name, layer)
    elif position == "pre":
        layer.register_forward_pre_hook(_Before(*place))
    else:
        layer.register_forward_hook((_After if position == "out" else _Around)(*place))
    _, holder = block.holder(path)
    holder.add_module(CHILD, module)
    if holder is not layer:
        layer.__dict__[_HOLDER] = holder  # no child; copies and pickles of the network hold theirs
    if isinstance(layer, _BatchNorm) and path:
        block.module.register_forward_pre_hook(_Watch(path))
    below = model
    below.__dict__["_modules"] = _Children(below._modules)
    for part in filter(None, f"{block.name}.{path}".split(".")):
        below = getattr(below, part)
        below.__dict__["_modules"] = _Children(below._modules)
        if hasattr(below, "fuse"):
            below.__dict__["fuse"] = _refuse_fuse


class _Children(dict[str, nn.Module | None]):
    """The children of a module on the way to a site. Dynamo guards on the type of this dict, not on hooks:
    with a plain dict, the graph compiled for a plain network would be reused for an injected one."""


def _hooks(layer: nn.Module) -> list[Callable[..., Any]]:
    # no generator: Dynamo traces _Watch, and does not know how to close one
    return [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]


def _hook(layer: nn.Module) -> _Hook | None:
    """The hook that runs the layer's module: the first one, since fusing copies a layer's hooks to a copy
    that has them already."""
    for hook in _hooks(layer):
        if isinstance(hook, _Hook):
            return hook
    return None


def _to_like(module: nn.Module, like: nn.Module) -> nn.Module:
    """``module`` on the device and in the dtype of ``like``'s parameters, where it has any."""
    parameter = next(like.parameters(), None)
    if parameter is None:
        return module
    there = {parameter.device}, {parameter.dtype}
    held = [*module.parameters(), *module.buffers()]
    # PyTorch cannot move a module under FakeTensorMode, not even to where it is
    if ({t.device for t in held}, {t.dtype for t in held if t.is_floating_point()}) == there:
        return module
    return module.to(parameter.device, parameter.dtype)


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Place]]:
    """(name, layer, place) of every layer that holds a temporal module."""
    for name, layer in model.named_modules():
        if isinstance(layer, _Replacement):
            yield name, layer, layer.replaced
        elif (hook := _hook(layer)) is not None:
            yield name, layer, hook


def _watched(model: nn.Module) -> list[nn.Module]:
    """The layers on which :class:`_Watch` expects a module, with those above them in their blocks."""
    layers = []
    for block in model.modules():
        for watch in (hook for hook in _hooks(block) if isinstance(hook, _Watch)):
            layers.append(block)
            for part in watch.path.split("."):
                layers.append(getattr(layers[-1], part))
    return layers


def _forget_compiled() -> None:
    """Discard compiled graphs: Dynamo does not guard on hooks and would run the old ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

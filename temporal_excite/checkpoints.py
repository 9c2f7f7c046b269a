"""Weights of the released ACTION-Net, TSM and TEA networks, loaded under our names.

A further module needs one entry in ``_LAYOUTS``: where the released networks keep its layers.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .classifier import VideoClassifier
from .injection import CHILD, Site, sites
from .modules import ActionModule, TemporalShift
from .ops import check_model

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ModuleLayout:
    """Where released networks keep the layers of one of our modules.

    Args:
        names: layer of our module ("" the module itself) -> layer of the released one.
        at: name of the released module; ``{layer}`` is the layer it precedes or follows, ``{block}`` its
            block.
        wraps: the released module holds the layer it precedes as its child ``net``.
        placement: its placement in the released networks.
        requires: the attributes our module must have to compute the same as the released one.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    at: str = "{layer}"
    wraps: bool = True
    placement: str = "loc1"
    requires: Mapping[str, object] = field(default_factory=dict)


# by class, or by Site.placement for a part of a network that puts several modules into a block ("me")
_LAYOUTS: dict[type[nn.Module] | str, ModuleLayout] = {
    TemporalShift: ModuleLayout(),
    ActionModule: ModuleLayout(
        {
            "shift": "action_shift",
            "ste": "action_p1_conv1",
            "ce.squeeze": "action_p2_squeeze",
            "ce.temporal": "action_p2_conv1",
            "ce.expand": "action_p2_expand",
            "me.squeeze": "action_p3_squeeze",
            "me.norm": "action_p3_bn1",
            "me.transform": "action_p3_conv1",
            "me.expand": "action_p3_expand",
        },
        requires={"identity_start": False, "relu": True, "causal": False},
    ),
    "me": ModuleLayout(
        {
            "me.squeeze": "conv1",
            "me.norm": "bn1",
            "me.transform": "conv2",
            "me.expand": "conv3",
            "me.norm2": "bn3",
        },
        at="{block}.me",
        wraps=False,
        placement="me",
        requires={"me.form": "released", "me.causal": False},
    ),
    # the temporal convolution itself, or PartConv's
    **{
        f"mta.{part}": ModuleLayout(
            {"": "conv", "conv": "conv"},
            f"{{block}}.shifts.{part - 1}",
            wraps=False,
            placement=f"mta.{part}",
            requires={"causal": False},
        )
        for part in (1, 2, 3, 4)
    },
}


def load_released(model: Model, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Fill a model with the weights of a released ACTION-Net, TSM, TSN or TEA checkpoint, in place.

    Either every tensor of the model, its classifier included, is filled and every key of the checkpoint used,
    or nothing is loaded and the error names what does not fit. Batch norms' ``num_batches_tracked`` may be
    absent. Names may start with ``module.`` and ``base_model.``. Where the released networks hold a tensor
    twice (BNInception's ``shift_*.net`` is the next convolution), one is enough; two must be equal.

    Some settings cannot be read from a checkpoint: ``n_segment``, ``shift_div`` and, for TSM, ``causal`` must
    be what it was trained with. On BNInception, TSN's and TSM's checkpoints have the same keys.

    Args:
        model: timm's ``resnet*``, ``res2net50_26w_4s``, ``mobilenetv2_*`` or ``bninception`` with the
            checkpoint's temporal modules injected (none for TSN), or a
            :class:`~temporal_excite.VideoClassifier` of it.
        checkpoint: a file, read with ``weights_only=True``, or what it holds: ``{"state_dict": {...}}`` or
            the state dict itself.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of the wrong type.
        FileNotFoundError: no such file.
        ValueError: an unsupported model, a file that is no checkpoint, or a checkpoint of another network.
    """
    check_model(model)
    inner = model.model if isinstance(model, VideoClassifier) else model
    expected = _expected_names(inner)
    given = _tensors(checkpoint)
    state = inner.state_dict()

    filled: dict[str, Tensor] = {}
    known = {name for names in expected.values() for name in names}
    problems: dict[str, list[str]] = {
        "missing": [],
        "not the model's": [name for name in given if name not in known],
        "of another shape": [],
        "unequal": [],
    }
    for key, names in expected.items():
        present = [name for name in names if name in given]
        if not present:
            if not key.endswith(".num_batches_tracked"):
                problems["missing"].append(names[0])
            continue
        first, *others = present
        tensor, shape = given[first], state[key].shape
        if any(not torch.equal(given[other], tensor) for other in others):
            problems["unequal"].append(" and ".join(present))
        if tensor.shape[:1] == (1,) and tensor.shape[1:] == shape:
            tensor = tensor[0]  # STE's Conv3d kernel has an axis more there, Caffe's batch norms are (1, C)
        if tensor.shape != shape:
            problems["of another shape"].append(f"{first} {tuple(tensor.shape)}, here {tuple(shape)}")
        filled[key] = tensor
    if any(problems.values()):
        raise ValueError(_complaint(inner, problems, given))
    inner.load_state_dict({**state, **filled})
    return model


class _Network:
    """Names of a released network's layers; here those of ResNets, which are timm's."""

    head = "fc"

    def __init__(self, model: nn.Module) -> None:
        pass

    def layer(self, name: str) -> tuple[str, ...]:
        """The released names of a layer or block of ours; empty for one the released network lacks."""
        return (name,)

    def module(self, site: Site, layout: ModuleLayout) -> str:
        """The released name of a temporal module."""
        layer, block = self.layer(site.layer), self.layer(site.block)
        return layout.at.format(layer="|".join(layer), block="|".join(block))

    def hosts(self, site: Site, layout: ModuleLayout) -> dict[str, tuple[str, ...]]:
        """Layers of ours that the released network names otherwise because of a temporal module."""
        return {site.layer: (f"{self.module(site, layout)}.net",)} if layout.wraps else {}


class _MobileNetV2(_Network):
    head = "classifier"

    def __init__(self, model: nn.Module) -> None:
        self.names = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier"}
        blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]  # type: ignore
        for number, name in enumerate(blocks, start=1):
            expands = hasattr(model.get_submodule(name), "conv_pwl")
            layers = ("conv_pw", "bn1", None, "conv_dw", "bn2", None, "conv_pwl", "bn3")
            for index, layer in enumerate(layers if expands else ("conv_dw", "bn1", None, "conv_pw", "bn2")):
                self.names[f"{name}.{layer}"] = f"features.{number}.conv.{index}"
            self.names[name] = f"features.{number}"
        self.names["conv_head"] = f"features.{len(blocks) + 1}.0"
        self.names["bn2"] = f"features.{len(blocks) + 1}.1"

    def layer(self, name: str) -> tuple[str, ...]:
        return (self.names[name],) if name in self.names else ()


class _BNInception(_Network):
    def __init__(self, model: nn.Module) -> None:
        self.shifts, self.first_convs = {}, {}
        previous = "2"
        for name, block in model.named_children():
            if name.startswith("inception_"):
                self.shifts[name] = f"shift_{previous}"  # named after the block it follows
                first = "branch3x3.reduce" if block.branch1x1 is None else "branch1x1"
                self.first_convs[name] = f"{name}.{first}.conv"
                previous = name.removeprefix("inception_")

    def layer(self, name: str) -> tuple[str, ...]:
        from .models.bninception import caffe_names  # needs timm

        return caffe_names(name)

    def module(self, site: Site, layout: ModuleLayout) -> str:
        return self.shifts[site.block]

    def hosts(self, site: Site, layout: ModuleLayout) -> dict[str, tuple[str, ...]]:
        if not layout.names:  # TSM's shift is no module there
            return {}
        conv = self.first_convs[site.block]
        return {conv: (*self.layer(conv), f"{self.module(site, layout)}.net")}


_NETWORKS: dict[str, type[_Network]] = {
    "timm.models.resnet.ResNet": _Network,
    "timm.models.efficientnet.EfficientNet": _MobileNetV2,
    "temporal_excite.models.bninception.BNInception": _BNInception,
}


_KNOWN = (
    "load_released knows timm's resnet*, res2net*, mobilenetv2_* and bninception, "
    "and VideoClassifiers of them"
)


def _network(model: nn.Module) -> _Network:
    for cls in type(model).__mro__:
        if network := _NETWORKS.get(f"{cls.__module__}.{cls.__qualname__}"):
            return network(model)
    raise ValueError(f"no released weights for {type(model).__name__}: {_KNOWN}")


def _expected_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our state-dict key -> the released keys that may hold it."""
    network = _network(model)
    inside: dict[str, str] = {}  # layer inside a temporal module -> released layer
    hosts: dict[str, tuple[str, ...]] = {network.head: ("new_fc", *network.layer(network.head))}
    for site in sites(model):
        layout = _LAYOUTS.get(site.placement) or _LAYOUTS.get(type(site.module))
        if layout is None:
            known = sorted(key if isinstance(key, str) else key.__name__ for key in _LAYOUTS)
            raise ValueError(f"no released layout for {site.kind} at {site.layer}; known: {', '.join(known)}")
        for name, value in layout.requires.items():
            if (found := attrgetter(name)(site.module)) != value:
                raise ValueError(
                    f"{site.kind} at {site.layer} has {name}={found}; the released networks "
                    f"compute the form with {name}={value}"
                )
        if site.placement != layout.placement:
            raise ValueError(
                f"{site.kind} is at {site.placement} of {site.block}, "
                f"the released networks have it at {layout.placement}"
            )
        hosts |= network.hosts(site, layout)
        for ours, theirs in layout.names.items():
            inside[f"{site.layer}.{CHILD}.{ours}".rstrip(".")] = f"{network.module(site, layout)}.{theirs}"
    expected = {}
    for key in model.state_dict():
        layer, _, tensor = key.rpartition(".")
        names = (inside[layer],) if layer in inside else hosts.get(layer) or network.layer(layer)
        if not names:
            raise ValueError(f"{type(model).__name__} has {key}, which no released network has: {_KNOWN}")
        expected[key] = tuple(f"{name}.{tensor}" for name in names)
    return expected


def _tensors(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict a checkpoint holds, names without their prefixes."""
    source = "checkpoint"
    if isinstance(checkpoint, str | os.PathLike):
        source = os.fspath(checkpoint)
        checkpoint = _read(source)
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"{source} must hold a dict, it holds a {type(checkpoint).__name__}")
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"{source} must be a path or a dict, got {type(checkpoint).__name__}")
    entries = checkpoint.get("state_dict", checkpoint)
    if not isinstance(entries, Mapping):
        raise ValueError(f"{source}'s state_dict is a {type(entries).__name__}, not a dict")
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        if not isinstance(key, str):
            raise ValueError(f"{source} holds no state dict: {key!r} is not the name of a tensor")
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{source} holds no state dict: {key!r} is a {type(value).__name__}, not a tensor"
            )
        if not has_values(value):
            raise ValueError(
                f"{source} has {key!r} as {value.dtype}, {value.layout}, on {value.device}: not a dense "
                "tensor of real numbers"
            )
        name = key.removeprefix("module.").removeprefix("base_model.")
        if name in tensors:
            raise ValueError(f"{source} holds {name!r} twice, with and without a prefix")
        tensors[name] = value
    if not tensors:
        raise ValueError(f"{source} holds no tensors")
    return tensors


def has_values(x: Tensor) -> bool:
    """Whether a tensor can fill another, losing nothing but precision."""
    plain = x.layout is torch.strided and not (x.is_meta or x.is_quantized)
    return plain and x.dtype is not torch.bool and not x.is_complex()


def _read(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise ValueError(
                f"{path} holds other Python objects than tensors, which are not loaded because they can run "
                "code. If you trust the file, pass "
                "torch.load(path, map_location='cpu', weights_only=False)['state_dict'] instead"
            ) from error
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged") from error
    except Exception as error:  # torch.load raises whatever the broken bytes led to
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged: {error!r}") from error


def _complaint(
    model: nn.Module,
    problems: dict[str, list[str]],
    given: Mapping[str, Tensor],
) -> str:
    held = sites(model)
    ours = f"{type(model).__name__} with {_count(held)}"
    if len(problems["not the model's"]) == len(given):
        lines = [f"the checkpoint is of another network than {ours}: it has none of the expected keys"]
    else:
        lines = [f"the checkpoint does not fit {ours}; nothing was loaded"]
    if any(".action_shift." in key for key in given):
        theirs = "ACTION modules: inject(model, 'action')"
    elif any(".shifts." in key for key in given):
        theirs = "TEA blocks: inject(model, 'tea')"
    elif any(".net." in key for key in given):
        theirs = "TSM's shifts: inject(model, 'tsm')"
    else:
        theirs = "no temporal modules in layers of their own, as TSN"
    lines.append(f"the checkpoint has {theirs}")
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            lines.append(f"{len(keys)} {what}: {', '.join(keys[:5])}{more}")
    if any(name in text for text in problems["of another shape"] for name in ("new_fc", "fc.", "classifier")):
        lines.append(
            "for another number of classes, create the model with the checkpoint's number, load it, and call "
            "VideoClassifier.reset_head"
        )
    return "; ".join(lines)


def _count(held: list[Site]) -> str:
    names = sorted({site.kind for site in held})
    return f"{len(held)} {', '.join(names)}" if held else "no temporal modules"

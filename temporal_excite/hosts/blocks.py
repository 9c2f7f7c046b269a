"""Finding the blocks of a network and the layers a temporal module can hang on."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

PLACEMENTS = ("loc1", "loc2", "loc3", "loc4")


@dataclass(frozen=True)
class Host:
    """The points of one block class where a module may sit (ACTION-Net, supplement B).

    A point is an anchor: ``"pre:conv1"`` means the input of the block's child ``conv1``, ``"out:bn3"`` the
    output of ``bn3``. Children may be dotted (``"conv1.0"``, ``"#-1"`` is the last child); ``"a|b"`` takes
    the first that is not None; no child (``"pre:"``) is the block itself.

    Args:
        loc1: start of the residual branch.
        loc2: after the first convolution.
        loc3: after the second.
        loc4: before the addition (or concatenation).
        live: the attribute that tells whether this block has a shortcut (``"!name"`` negates); None: always.
    """

    loc1: str | None = None
    loc2: str | None = None
    loc3: str | None = None
    loc4: str | None = None
    live: str | None = None

    @property
    def placements(self) -> tuple[str, ...]:
        """The placements this block class has."""
        return tuple(name for name in PLACEMENTS if getattr(self, name))


@dataclass(frozen=True)
class Block:
    """One block of a network: its name, its module, what is known of its class, and its stage."""

    name: str
    module: nn.Module
    host: Host
    stage: int | None

    @property
    def live(self) -> bool:
        """Whether the block has a shortcut (or needs none)."""
        flag = self.host.live
        if flag is None:
            return True
        value = getattr(self.module, flag.lstrip("!"))
        present = value is not None and value is not False
        return present != flag.startswith("!")

    def anchor(self, placement: str) -> str:
        """The anchor of ``"loc1"`` .. ``"loc4"``.

        Raises:
            ValueError: the block class does not have that point; the message lists the ones it has.
        """
        anchor = getattr(self.host, placement)
        if anchor is None:
            raise ValueError(
                f"{type(self.module).__name__} ({self.name}) has no {placement}; "
                f"it has {', '.join(self.host.placements)}"
            )
        return str(anchor)

    def layer(self, anchor: str) -> tuple[str, nn.Module]:
        """Name (below the block, "" for the block itself) and module of the layer an anchor means."""
        _, _, path = anchor.partition(":")
        for choice in path.split("|"):
            names: list[str] = []
            module: nn.Module | None = self.module
            for part in filter(None, choice.split(".")):
                if part.startswith("#"):
                    part = list(module._modules)[int(part[1:])]  # type: ignore[union-attr]
                names.append(part)
                module = getattr(module, part, None)
                if module is None:
                    break
            if module is not None:
                return ".".join(names), module
        raise ValueError(f"{type(self.module).__name__} ({self.name}) has no layer {path!r}")

    def channels(self, anchor: str) -> int:
        """Number of channels of the tensor at an anchor."""
        _, layer = self.layer(anchor)
        names = (
            ("in_channels", "num_features") if anchor.startswith("pre:") else ("out_channels", "num_features")
        )
        inside = list(layer.modules())[1:]
        if anchor.startswith("out:"):
            inside.reverse()
        for module in (layer, *inside):  # what the layer says of itself goes first
            for name in names:
                if isinstance(found := getattr(module, name, None), int):
                    return found
        raise ValueError(
            f"cannot tell the channels of {anchor!r} in {type(self.module).__name__} ({self.name})"
        )


_HOSTS: dict[str, Host] = {}


def register_host(block_class: type[nn.Module] | str, host: Host) -> None:
    """Teach ``inject`` a block class, given as the class or as its ``"module.QualName"``.

    Subclasses follow the nearest registered class of their method resolution order.
    """
    _HOSTS[block_class if isinstance(block_class, str) else _path(block_class)] = host


def host_of(module: nn.Module) -> Host | None:
    """What is known of a module's class, or None."""
    for cls in type(module).__mro__:
        if host := _HOSTS.get(_path(cls)):
            return host
    return None


def find_blocks(model: nn.Module) -> list[Block]:
    """All known blocks of a model in the order of its modules; blocks inside a block are not listed."""
    names = [name for name, _ in model.named_modules()]
    stage_ends = list(_stage_ends(model, names))
    blocks: list[Block] = []
    for index, (name, module) in enumerate(model.named_modules()):
        if blocks and name.startswith(blocks[-1].name + "."):
            continue
        if host := host_of(module):
            stage = next((s for s, start, end in stage_ends if start <= index <= end), None)
            blocks.append(Block(name, module, host, stage))
    return blocks


def _stage_ends(model: nn.Module, names: list[str]) -> Iterator[tuple[int, int, int]]:
    """(stage, first, last) by module index, from timm's ``feature_info``: the last entry is stage 5 (res5),
    the one before stage 4, and so on, whatever the network calls them."""
    for root, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        info = getattr(info, "info", info)  # features_only models wrap the list
        if not isinstance(info, list):
            continue
        prefix = root + "." if root else ""
        entries = [entry["module"] for entry in info]
        start = names.index(root)
        for number, entry in enumerate(entries, start=6 - len(entries)):
            below = [i for i, n in enumerate(names) if (n + ".").startswith(prefix + entry + ".")]
            if below:
                yield number, start, below[-1]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

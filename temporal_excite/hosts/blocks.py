"""Finding the blocks of a network and the layers a temporal module can hang on."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

PLACEMENTS = ("loc1", "loc2", "loc3", "loc4")
"""The points of a block, from its start to its end (ACTION-Net, supplement B); see :class:`Host`."""


@dataclass(frozen=True)
class Host:
    """The points of one block class where a module may sit (ACTION-Net, supplement B).

    A point is an anchor: ``"pre:conv1"`` means the input of the block's child ``conv1``, ``"out:bn3"`` the
    output of ``bn3``. Children may be dotted (``"conv1.0"``, ``"#-1"`` is the last child); ``"a|b"`` takes
    the first that is not None; no child (``"pre:"``) is the block itself. Where the layer is an
    ``nn.Sequential``, its first (``pre``) or last (``out``) layer is meant. Where the channels cannot be read
    off the layer, ``"anchor@anchor"`` names another one with as many.

    Args:
        loc1: start of the residual branch.
        loc2: after the first convolution.
        loc3: after the second.
        loc4: before the addition (or concatenation).
        shortcut: the attribute that tells whether this block has one (``"!name"`` negates); None: always.
        tokens: the attribute (dotted) of blocks that work on tokens ``(B, N, C)``: no module sits there.
        nhwc: the block works on ``(B, H, W, C)``.
        each: the class is a whole plain network: below its child of this name every convolution but the
            first is a block.
        note: what a reader of the support matrix must know.
    """

    loc1: str | None = None
    loc2: str | None = None
    loc3: str | None = None
    loc4: str | None = None
    shortcut: str | None = None
    tokens: str | None = None
    nhwc: bool = False
    each: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.placements:
            raise ValueError(f"a block needs at least one of {', '.join(PLACEMENTS)}")
        for name in self.placements:
            anchor = getattr(self, name)
            if not isinstance(anchor, str) or any(
                part.partition(":")[:2] not in (("pre", ":"), ("out", ":")) for part in anchor.split("@")
            ):
                raise ValueError(f'{name} must read "pre:child" or "out:child", got {anchor!r}')
        for name in ("shortcut", "tokens"):
            if not isinstance(attribute := getattr(self, name), str | None):
                raise TypeError(f"{name} must be the name of an attribute, got {attribute!r}")

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
    def has_shortcut(self) -> bool:
        """Whether the block has a shortcut (or needs none)."""
        flag = self.host.shortcut
        if flag is None:
            return True
        if not hasattr(self.module, flag.lstrip("!")):
            raise ValueError(
                f"{type(self.module).__name__} ({self.name}) has no attribute {flag.lstrip('!')!r}, which "
                "its host names as the shortcut"
            )
        value = getattr(self.module, flag.lstrip("!"))
        present = value is not None and value is not False
        return present != flag.startswith("!")

    @property
    def on_tokens(self) -> bool:
        """Whether the block works on tokens ``(B, N, C)``, where no module can sit."""
        if self.host.tokens is None:
            return False
        value: object = self.module
        for part in self.host.tokens.split("."):
            value = getattr(value, part, None)
        return value is not None

    def anchor(self, placement: str) -> str:
        """The anchor of ``"loc1"`` .. ``"loc4"``.

        Raises:
            ValueError: the block class does not have that point; the message lists the ones it has.
        """
        anchor = getattr(self.host, placement)
        if anchor is None:
            raise ValueError(
                f"{type(self.module).__name__} ({self.name}) has no {placement}; it has "
                f"{', '.join(self.host.placements)}: choose one of them, or leave such blocks out by exclude="
            )
        return str(anchor)

    def layer(self, anchor: str) -> tuple[str, nn.Module]:
        """Name (below the block, "" for the block itself) and module of the layer an anchor means."""
        position, _, path = anchor.partition("@")[0].partition(":")
        for choice in path.split("|"):
            names: list[str] = []
            module: nn.Module | None = self.module
            for part in filter(None, choice.split(".")):
                if part.startswith("#"):
                    try:
                        part = list(module._modules)[int(part[1:])]  # type: ignore[union-attr]
                    except (IndexError, ValueError):
                        module = None
                        break
                names.append(part)
                module = getattr(module, part, None)
                if not isinstance(module, nn.Module):
                    module = None
                    break
            # A Sequential runs every child it has, so it cannot hold a temporal module
            while position in ("pre", "out") and _plain_sequence(module):
                names.append(list(module._modules)[0 if position == "pre" else -1])  # type: ignore[union-attr]
                module = getattr(module, names[-1])
            if module is not None:
                return ".".join(names), module
        raise ValueError(f"{type(self.module).__name__} ({self.name}) has no layer {path!r}")

    def holder(self, path: str) -> tuple[str, nn.Module]:
        """The layer at ``path``, or the next one above it, that can hold a child: a container runs or
        iterates all its children.

        Raises:
            ValueError: there is none within the block.
        """
        while isinstance(module := self.module.get_submodule(path), _CONTAINERS):
            if not path:
                raise ValueError(
                    f"{type(self.module).__name__} ({self.name}) is a container that runs all its children: "
                    "no temporal module can be its child; register the blocks inside it"
                )
            path = path.rpartition(".")[0]
        return path, module

    def channels(self, anchor: str) -> int:
        """Number of channels of the tensor at an anchor, read off the layer; where the layer has none
        (identity, activation, drop path), off the last one before it or the first after it."""
        anchor = anchor.rpartition("@")[2]
        _, layer = self.layer(anchor)
        inside = list(layer.modules())
        around = list(self.module.modules())
        start = next(i for i, module in enumerate(around) if module is layer)
        own = _read(inside, _TAKES) if anchor.startswith("pre:") else _read([layer, *inside[::-1]], _GIVES)
        found = own or _read(around[:start][::-1], _GIVES) or _read(around[start + len(inside) :], _TAKES)
        if found is None:
            raise ValueError(
                f"cannot tell the channels of {anchor!r} in {type(self.module).__name__} ({self.name})"
            )
        return found


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TAKES = ("in_channels", "num_features", "num_channels", "normalized_shape", "in_features")
_GIVES = ("out_channels", "out_chs", "num_features", "num_channels", "normalized_shape", "out_features")


def _plain_sequence(module: nn.Module | None) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and bool(module._modules)  # type: ignore[union-attr]


def _read(modules: list[nn.Module], names: tuple[str, ...]) -> int | None:
    for module in modules:
        for name in names:
            found = getattr(module, name, None)
            if isinstance(found, tuple) and found:
                found = found[-1]
            if isinstance(found, int):
                return found
    return None


_HOSTS: dict[str, Host] = {}


def register_host(
    block_class: type[nn.Module] | str,
    *,
    loc1: str | None = None,
    loc2: str | None = None,
    loc3: str | None = None,
    loc4: str | None = None,
    shortcut: str | None = None,
    tokens: str | None = None,
    nhwc: bool = False,
) -> None:
    """Teach ``inject`` a block class of yours; subclasses follow the nearest registered class.

    Registering a class again replaces what was known of it.

    Args:
        block_class: the class, or its ``"module.QualName"`` where importing it is unwanted.
        loc1: start of the residual branch, as an anchor: ``"pre:conv1"`` is the input of the block's child
            ``conv1``, ``"out:bn3"`` the output of ``bn3``. Children may be dotted (``"branch.0"``, ``"#-1"``
            the last child); ``"pre:a|b"`` takes the first that is not None; ``"pre:"`` is the block's own
            input. Where the channels cannot be read off the layer, ``"pre:mix@pre:conv1"`` reads them at
            another anchor.
        loc2: after the first convolution.
        loc3: after the second.
        loc4: before the addition.
        shortcut: the attribute that tells whether a block has one (``"!name"`` negates); None: always.
        tokens: an attribute (dotted) of blocks that work on tokens ``(B, N, C)``; those are skipped.
        nhwc: the blocks work on ``(B, H, W, C)``.

    Raises:
        TypeError: ``block_class`` is neither a module class nor a string.
        ValueError: no point, or an anchor that does not start with ``"pre:"`` or ``"out:"``.

    Example:
        >>> import temporal_excite as te
        >>> from torch import nn
        >>> class MyBlock(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        ...         self.norm = nn.BatchNorm2d(channels)
        ...     def forward(self, x):
        ...         return (x + self.norm(self.conv(x))).relu()
        >>> te.register_host(MyBlock, loc1="pre:conv", loc2="out:conv", loc4="out:norm")
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), MyBlock(16), MyBlock(16))
        >>> model = te.inject(model, "tsm", n_segment=4)
        >>> [site.layer for site in te.sites(model)]
        ['1.conv', '2.conv']
    """
    if isinstance(block_class, type) and issubclass(block_class, nn.Module):
        block_class = _path(block_class)
    if not isinstance(block_class, str) or "." not in block_class:
        raise TypeError(
            f"block_class must be a torch.nn.Module class or its dotted name, got {block_class!r}"
        )
    _HOSTS[block_class] = Host(loc1, loc2, loc3, loc4, shortcut=shortcut, tokens=tokens, nhwc=nhwc)


def known_hosts() -> dict[str, Host]:
    """All known block classes by their ``"module.QualName"``."""
    return dict(_HOSTS)


def host_of(module: nn.Module) -> Host | None:
    """The host of a module's class, or None; a flat network, which has lost its class, is recognised too."""
    for cls in type(module).__mro__:
        if host := _HOSTS.get(_path(cls)):
            return host
    return _FLAT if _is_flat(module) else None


_FLAT = Host("pre:", each="")


def _is_flat(module: nn.Module) -> bool:
    """Whether this is a plain network as timm's ``features_only`` leaves it: layers, without its class."""
    if not any(_path(cls) == "timm.models._features.FeatureListNet" for cls in type(module).__mro__):
        return False
    return all(next(layer.children(), None) is None for layer in module.children())


def find_blocks(model: nn.Module) -> list[Block]:
    """All known blocks of a model in the order of its modules; blocks inside a block are not listed."""
    named = list(model.named_modules())
    stage_ends = list(_stage_ends(model, [name for name, _ in named]))
    blocks: list[Block] = []
    inside: str | None = None  # prefix of the names below the last block
    plain: set[int] = set()  # convolutions that are blocks of a plain network
    plain_host = None
    for index, (name, module) in enumerate(named):
        if inside is not None and name.startswith(inside):
            continue
        host = plain_host if id(module) in plain else host_of(module)
        if host is None:
            continue
        if host.each is not None and id(module) not in plain:
            convs = [m for m in module.get_submodule(host.each).modules() if isinstance(m, nn.Conv2d)]
            plain, plain_host = {id(m) for m in convs[1:]}, host
            continue
        stage = next((s for s, start, end in stage_ends if start <= index <= end), None)
        blocks.append(Block(name, module, host, stage))
        inside = f"{name}." if name else ""
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
            either = entry, entry.replace(".", "_", 1)  # the second as features_only names it
            starts = tuple(f"{prefix}{e}." for e in either)
            below = [i for i, n in enumerate(names) if (n + ".").startswith(starts)]
            if below:
                yield number, start, below[-1]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

"""The names that ``inject(model, module=name)`` knows."""

from collections.abc import Callable
from typing import Any

from torch import nn

ModuleFactory = Callable[..., nn.Module]
"""``factory(channels, n_segment=..., **kwargs) -> nn.Module``."""

NetworkPlan = Callable[..., list[Any]]
"""``plan(blocks, n_segment, **kwargs)`` -> the insertions to make in the chosen blocks
(:class:`temporal_excite.injection.Insertion`); raises before any module of a block is touched."""

_MODULES: dict[str, ModuleFactory] = {}
_NETWORKS: dict[str, NetworkPlan] = {}


def register_module(name: str, factory: ModuleFactory) -> None:
    """Make ``inject(model, name)`` build ``factory(channels, n_segment=..., **kwargs)`` at every site.

    ``inject(..., causal=True)`` adds ``causal=True``; a module that takes it derives from
    :class:`~temporal_excite.modules.TemporalModule` and gets earlier frames from its ``past``.

    Raises:
        TypeError: the factory cannot be called, or the name is not a string.
        ValueError: the name is taken.
    """
    _check_entry(name, factory)
    _MODULES[name] = factory


def register_network(name: str, plan: NetworkPlan) -> None:
    """Make ``inject(model, name)`` put modules where ``plan(blocks, n_segment, **kwargs)`` says.

    For networks that need several modules in a block, or different ones in different blocks.

    Raises:
        TypeError: the plan cannot be called, or the name is not a string.
        ValueError: the name is taken.
    """
    _check_entry(name, plan)
    _NETWORKS[name] = plan


def module_factory(name: str) -> ModuleFactory:
    """The factory registered under ``name``.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    if name not in _MODULES:
        raise ValueError(
            f"unknown module {name!r}; known modules: {', '.join(module_names())}; "
            f"networks: {', '.join(network_names())}"
        )
    return _MODULES[name]


def network_plan(name: str) -> NetworkPlan | None:
    """The plan registered under ``name``, or None."""
    return _NETWORKS.get(name)


def module_names() -> list[str]:
    """All registered names of modules, sorted."""
    return sorted(_MODULES)


def network_names() -> list[str]:
    """All registered names of networks, sorted: ``inject`` takes them like the names of modules."""
    return sorted(_NETWORKS)


def _check_entry(name: str, entry: object) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"a name is a string of at least one letter, got {name!r}")
    if not callable(entry):
        raise TypeError(f"{name!r} needs something to call, got {entry!r}")
    for known in (_MODULES, _NETWORKS):
        if name in known:
            raise ValueError(f"name {name!r} is taken by {known[name]!r}")

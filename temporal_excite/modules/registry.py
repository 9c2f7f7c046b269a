"""The names that ``inject(model, module=name)`` knows."""

from collections.abc import Callable

from torch import nn

ModuleFactory = Callable[..., nn.Module]
"""``factory(channels, n_segment=..., **kwargs) -> nn.Module``."""

_MODULES: dict[str, ModuleFactory] = {}


def register_module(name: str, factory: ModuleFactory) -> ModuleFactory:
    """Make ``inject(model, name)`` build ``factory(channels, n_segment=..., **kwargs)`` at every site.

    Raises:
        ValueError: the name is taken.
    """
    if name in _MODULES:
        raise ValueError(f"module name {name!r} is taken by {_MODULES[name]!r}")
    _MODULES[name] = factory
    return factory


def module_factory(name: str) -> ModuleFactory:
    """The factory registered under ``name``.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    if name not in _MODULES:
        raise ValueError(f"unknown module {name!r}; known: {', '.join(module_names())}")
    return _MODULES[name]


def module_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_MODULES)

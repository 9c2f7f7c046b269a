"""Temporal modules for image models: see the README."""

from .injection import eject, inject, set_n_segment, sites
from .modules import CE, ME, STE, ActionModule, TemporalConv, TemporalShift, module_names, register_module

__all__ = [
    "CE",
    "ME",
    "STE",
    "ActionModule",
    "TemporalConv",
    "TemporalShift",
    "eject",
    "inject",
    "module_names",
    "register_module",
    "set_n_segment",
    "sites",
]
__version__ = "0.1.0"

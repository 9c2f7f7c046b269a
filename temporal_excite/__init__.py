"""Temporal modules for image models: see the README."""

from . import networks as networks  # fills the registry
from .injection import eject, inject, set_n_segment, sites
from .modules import (
    CE,
    ME,
    MTA,
    STE,
    ActionModule,
    FEModule,
    TEABlock,
    TEModule,
    TemporalConv,
    TemporalShift,
    module_names,
    network_names,
    register_module,
    register_network,
)

__all__ = [
    "CE",
    "ME",
    "MTA",
    "STE",
    "ActionModule",
    "FEModule",
    "TEABlock",
    "TEModule",
    "TemporalConv",
    "TemporalShift",
    "eject",
    "inject",
    "module_names",
    "network_names",
    "register_module",
    "register_network",
    "set_n_segment",
    "sites",
]
__version__ = "0.1.0"

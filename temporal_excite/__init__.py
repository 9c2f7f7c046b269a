"""Temporal modules for image models: see the README."""

from .checkpoints import load_released
from .classifier import VideoClassifier
from .complexity import Complexity, count, efficiency
from .hosts import register_host
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
    set_fast,
)
from .stream import Stream, StreamOutput

try:
    from . import models as models  # registers them with timm
    from . import networks as networks  # fills the registry
except ModuleNotFoundError as error:  # the modules work without timm
    if (error.name or "").partition(".")[0] != "timm":
        raise

__all__ = [
    "CE",
    "ME",
    "MTA",
    "STE",
    "ActionModule",
    "Complexity",
    "FEModule",
    "Stream",
    "StreamOutput",
    "TEABlock",
    "TEModule",
    "TemporalConv",
    "TemporalShift",
    "VideoClassifier",
    "count",
    "efficiency",
    "eject",
    "inject",
    "load_released",
    "module_names",
    "network_names",
    "register_host",
    "register_module",
    "register_network",
    "set_fast",
    "set_n_segment",
    "sites",
]
__version__ = "0.1.0"

"""The temporal modules, one file a paper. They need torch alone."""

from .action import CE, ME, STE, ActionModule
from .base import TemporalModule, set_fast
from .registry import module_names, network_names, register_module, register_network
from .tea import MTA, MotionExcitation, TEABlock
from .tefe import FEModule, TEModule
from .tsm import TemporalConv, TemporalShift

__all__ = [
    "CE",
    "ME",
    "MTA",
    "STE",
    "ActionModule",
    "FEModule",
    "MotionExcitation",
    "TEABlock",
    "TEModule",
    "TemporalConv",
    "TemporalModule",
    "TemporalShift",
    "module_names",
    "network_names",
    "register_module",
    "register_network",
    "set_fast",
]

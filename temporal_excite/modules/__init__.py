"""The temporal modules, one file a paper. They need torch alone."""

from .action import CE, ME, STE, ActionModule
from .registry import module_names, register_module
from .tsm import TemporalConv, TemporalShift

__all__ = [
    "CE",
    "ME",
    "STE",
    "ActionModule",
    "TemporalConv",
    "TemporalShift",
    "module_names",
    "register_module",
]

"""What ``inject`` knows of other people's blocks: one table, block class -> its four points."""

from . import table as table  # fills the registry
from .blocks import PLACEMENTS, Block, Host, find_blocks, known_hosts, register_host

__all__ = ["PLACEMENTS", "Block", "Host", "find_blocks", "known_hosts", "register_host"]

"""Networks the papers use and timm lacks. Importing this registers them with timm."""

from .bninception import BNInception, bninception

__all__ = ["BNInception", "bninception"]

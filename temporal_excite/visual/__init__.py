"""What a network looks at: class activation maps and excitation masks of clips, and pictures of them."""

from .maps import SiteGates, cam, excitations, grad_cam
from .pictures import animation, attention, figure, overlay, unnormalise

__all__ = [
    "SiteGates",
    "animation",
    "attention",
    "cam",
    "excitations",
    "figure",
    "grad_cam",
    "overlay",
    "unnormalise",
]

"""Following training: a tracker of any quantity on a probe set, its dashboard, and callbacks for training loops."""

from nngeom.track.callbacks import huggingface_callback, lightning_callback
from nngeom.track.plots import dashboard
from nngeom.track.quantities import QUANTITIES, Look, quantity
from nngeom.track.tracker import Tracker, geometric

__all__ = [
    "QUANTITIES",
    "Look",
    "Tracker",
    "dashboard",
    "geometric",
    "huggingface_callback",
    "lightning_callback",
    "quantity",
]

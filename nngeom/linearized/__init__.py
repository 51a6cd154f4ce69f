"""Lazy and hasty training: linearised models, how linear a run is, and comparison at equal progress."""

from nngeom.linearized.linearized import Linearized
from nngeom.linearized.scaled import Scaled, scaled_lr

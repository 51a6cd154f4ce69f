"""Optimizers that use the geometry: natural gradient with any representation, and robust averages of gradients."""

from nngeom.optim import eigenbasis  # registers how EKFAC is kept
from nngeom.optim.curvature import Curvature, keeps
from nngeom.optim.ekfac import EKFAC
from nngeom.optim.kfac import KFAC
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.optim.manner import Manner
from nngeom.optim.natural_gradient import NaturalGradient
from nngeom.optim.pending import Seen, SkippedStepWarning
from nngeom.optim.robust import WinsorizedSGD, median_of_means_gradient, winsorized_gradient
from nngeom.optim.schedule import Schedule

__all__ = [
    "EKFAC",
    "KFAC",
    "Curvature",
    "LevenbergMarquardt",
    "Manner",
    "NaturalGradient",
    "Schedule",
    "Seen",
    "SkippedStepWarning",
    "WinsorizedSGD",
    "keeps",
    "median_of_means_gradient",
    "winsorized_gradient",
]

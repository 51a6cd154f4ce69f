"""Optimizers that use the geometry: natural gradient with any representation, and robust averages of gradients."""

from nngeom.optim import eigenbasis  # registers how EKFAC is kept
from nngeom.optim.curvature import Curvature, keeps
from nngeom.optim.ekfac import EKFAC
from nngeom.optim.intake import ReductionWarning
from nngeom.optim.kfac import KFAC
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.optim.manner import Manner
from nngeom.optim.model_check import QuadraticModelWarning
from nngeom.optim.natural_gradient import NaturalGradient
from nngeom.optim.pending import Seen, SkippedStepWarning
from nngeom.optim.robust import WinsorizedSGD, median_of_means_gradient, winsorized_gradient
from nngeom.optim.schedule import Schedule
from nngeom.optim.soap import SOAP
from nngeom.optim.spectra import Spectrum, spectrum
from nngeom.optim.states import join_states
from nngeom.optim.variance_damping import VarianceDamping

__all__ = [
    "EKFAC",
    "KFAC",
    "SOAP",
    "Curvature",
    "LevenbergMarquardt",
    "Manner",
    "NaturalGradient",
    "QuadraticModelWarning",
    "ReductionWarning",
    "Schedule",
    "Seen",
    "SkippedStepWarning",
    "Spectrum",
    "VarianceDamping",
    "WinsorizedSGD",
    "join_states",
    "keeps",
    "median_of_means_gradient",
    "spectrum",
    "winsorized_gradient",
]

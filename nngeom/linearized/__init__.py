"""Lazy and hasty training: linearised models, how linear a run is, and comparison at equal progress."""

from nngeom.linearized.c_scores import CScores, c_scores
from nngeom.linearized.data import add_spurious_feature, in_disks, yin_yang, yin_yang_label
from nngeom.linearized.difficulty import Groups, flip_labels, groups_by_attribute, groups_by_flag, groups_by_score
from nngeom.linearized.linearity import Linearity, linearity
from nngeom.linearized.linearized import Linearized
from nngeom.linearized.progress import Curves, EqualProgress, Grid, equal_progress
from nngeom.linearized.quadratic import Modes, convergence_times, gradient_flow, quadratic_modes, singular_modes
from nngeom.linearized.quadratic_data import QuadraticData, label_noise, reversed_modes, spurious_feature
from nngeom.linearized.scaled import Scaled, scaled_lr

__all__ = [
    "CScores",
    "Curves",
    "EqualProgress",
    "Grid",
    "Groups",
    "Linearity",
    "Linearized",
    "Modes",
    "QuadraticData",
    "Scaled",
    "add_spurious_feature",
    "c_scores",
    "convergence_times",
    "equal_progress",
    "flip_labels",
    "gradient_flow",
    "groups_by_attribute",
    "groups_by_flag",
    "groups_by_score",
    "in_disks",
    "label_noise",
    "linearity",
    "quadratic_modes",
    "reversed_modes",
    "scaled_lr",
    "singular_modes",
    "spurious_feature",
    "yin_yang",
    "yin_yang_label",
]

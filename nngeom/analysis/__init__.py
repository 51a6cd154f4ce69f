"""Quantities of training geometry, one file each: tangent kernels, gradient statistics, complexity."""

from nngeom.analysis.alignment import (
    alignment,
    group_alignment,
    hsic,
    kernel_label_alignment,
    label_alignment,
    label_kernel,
    label_vector,
)
from nngeom.analysis.coherence import (
    Coherence,
    batch_coherence,
    coherence,
    coherence_from_batch_gradients,
    generalization_gap_bound,
    gradient_coherence,
)
from nngeom.analysis.complexity import ComplexityMeasure
from nngeom.analysis.eigenfunctions import Eigenfunctions, StepModes, eigenfunctions, linear_dynamics, step_modes
from nngeom.analysis.fisher_rao import fisher_rao_norm
from nngeom.analysis.geometric_complexity import geometric_complexity
from nngeom.analysis.influence_scores import ScoreQuality, leave_one_out, linear_datamodeling_score
from nngeom.analysis.kernel import center, kernel_pca, normalised_gram
from nngeom.analysis.path_norm import path_norm
from nngeom.analysis.rademacher import (
    flow_bound,
    generalization_bound,
    interpolation_bound,
    interpolation_norm,
    margin_bound,
    margins,
    rademacher_bound,
    rademacher_complexity,
    ramp_loss,
    rescaled_bound,
)
from nngeom.analysis.sharpness import Stability, non_uniformity, sgd_stability, sharpness, stability_eigenvalue
from nngeom.analysis.spectral_margin import SpectralMargin, spectral_margin
from nngeom.analysis.spectrum import SpectrumSummary, effective_rank, spectrum, spectrum_summary, trace_ratios
from nngeom.analysis.stiffness import Stiffness, gradient_stiffness, stiffness
from nngeom.analysis.supernat import SuperNat
from nngeom.analysis.unit_capacity import UnitCapacity, unit_capacity

__all__ = [
    "Coherence",
    "ComplexityMeasure",
    "Eigenfunctions",
    "ScoreQuality",
    "SpectralMargin",
    "SpectrumSummary",
    "Stability",
    "StepModes",
    "Stiffness",
    "SuperNat",
    "UnitCapacity",
    "alignment",
    "batch_coherence",
    "center",
    "coherence",
    "coherence_from_batch_gradients",
    "effective_rank",
    "eigenfunctions",
    "fisher_rao_norm",
    "flow_bound",
    "generalization_bound",
    "generalization_gap_bound",
    "geometric_complexity",
    "gradient_coherence",
    "gradient_stiffness",
    "group_alignment",
    "hsic",
    "interpolation_bound",
    "interpolation_norm",
    "kernel_label_alignment",
    "kernel_pca",
    "label_alignment",
    "label_kernel",
    "label_vector",
    "leave_one_out",
    "linear_datamodeling_score",
    "linear_dynamics",
    "margin_bound",
    "margins",
    "non_uniformity",
    "normalised_gram",
    "path_norm",
    "rademacher_bound",
    "rademacher_complexity",
    "ramp_loss",
    "rescaled_bound",
    "sgd_stability",
    "sharpness",
    "spectral_margin",
    "spectrum",
    "spectrum_summary",
    "stability_eigenvalue",
    "step_modes",
    "stiffness",
    "trace_ratios",
    "unit_capacity",
]

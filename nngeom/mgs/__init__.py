"""Model Gradient Similarity: kernels of model gradients as metrics, as penalties, and as a detector of adversarial
inputs.
"""

from nngeom.mgs.adversarial import auroc, fgsm, pgd, sample_fisher_trace, sample_trace
from nngeom.mgs.metrics import Metrics, kernel_metrics, metrics
from nngeom.mgs.penalties import logdet_penalty, loss_gradient_penalty, trace_penalty

__all__ = [
    "Metrics",
    "auroc",
    "fgsm",
    "kernel_metrics",
    "logdet_penalty",
    "loss_gradient_penalty",
    "metrics",
    "pgd",
    "sample_fisher_trace",
    "sample_trace",
    "trace_penalty",
]

"""Following training: a tracker of any quantity on a probe set, its dashboard, and callbacks for training loops."""

from nngeom.track.callbacks import accelerate_callback, huggingface_callback, lightning_callback
from nngeom.track.matrices import matrix_metric, optimizer_metric
from nngeom.track.plots import dashboard
from nngeom.track.quantities import QUANTITIES, Look, quantity
from nngeom.track.steps import StepCounter
from nngeom.track.tracker import Tracker, geometric
from nngeom.track.writers import CSVWriter, MLflowWriter, TensorBoardWriter, WandbWriter, Writer

__all__ = [
    "QUANTITIES",
    "CSVWriter",
    "Look",
    "MLflowWriter",
    "StepCounter",
    "TensorBoardWriter",
    "Tracker",
    "WandbWriter",
    "Writer",
    "accelerate_callback",
    "dashboard",
    "geometric",
    "huggingface_callback",
    "lightning_callback",
    "matrix_metric",
    "optimizer_metric",
    "quantity",
]

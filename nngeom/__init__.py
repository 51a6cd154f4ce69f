"""``nngeom``: the matrices of deep learning as objects to compute with."""

import typing as _typing

from nngeom.attribution.influence import Influence, influence
from nngeom.core.damping import Cutoff, FactoredTikhonov, Relative, Tikhonov
from nngeom.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    CollectionError,
    ConvergenceError,
    CoverageError,
    DampingError,
    DeviceError,
    FileError,
    FitWarning,
    LoaderError,
    MemoryWarning,
    MissingExtraError,
    ModeError,
    NNGeomError,
    NonFiniteError,
    OutputError,
    PeerError,
    RankMismatchError,
    RepeatedExamplesWarning,
    SameDataWarning,
    SingularError,
    SizeError,
    StructureError,
    UnevenBatchWarning,
    UnsupportedError,
)
from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.causal import CausalLM
from nngeom.cotangents.cross_entropy import CrossEntropy
from nngeom.cotangents.likelihood import Bernoulli, Gaussian, Likelihood, Poisson
from nngeom.fmat.dense import FMatBlockDiag, FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.implicit import FMatImplicit
from nngeom.fmat.sharded import FMatSharded
from nngeom.folders import to_folder
from nngeom.io import load, save
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit
from nngeom.maps.sharded import PullBackSharded, PushForwardSharded
from nngeom.measures.covariance import GradientCovariance
from nngeom.measures.gauss_newton import GGN
from nngeom.measures.hessian import Hessian
from nngeom.measures.jacobian import Jacobian
from nngeom.measures.kernels import GramMatrix
from nngeom.measures.layer_kernels import GramMatrices
from nngeom.measures.rows import rows
from nngeom.measures.second_moments import FIM, EmpiricalFIM, FIM_MonteCarlo
from nngeom.page.report import report
from nngeom.pmat.dense import PMatBlockDiag, PMatDense
from nngeom.pmat.diag import PMatDiag
from nngeom.pmat.ekfac import PMatEKFAC
from nngeom.pmat.estimate import MatrixEstimate
from nngeom.pmat.eye import PMatEye
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.in_files import PMatInFiles
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.low_rank import PMatLowRank
from nngeom.pmat.merge import merge
from nngeom.pmat.mixed import PMatMixed
from nngeom.pmat.quasi_diag import PMatQuasiDiag
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.shard import shard
from nngeom.regression import gradient_flow_mse, kernel_regression
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector
from nngeom.trusted import trust as _trust
from nngeom.views.approximation import approximation_report
from nngeom.views.diagnosis import diagnose
from nngeom.views.explanation import explain

__version__ = "0.1.0"

__all__ = [
    "FIM",
    "GGN",
    "ArgumentError",
    "ArgumentTypeError",
    "Bernoulli",
    "Categorical",
    "CausalLM",
    "CollectionError",
    "ConvergenceError",
    "CoverageError",
    "CrossEntropy",
    "Cutoff",
    "DampingError",
    "DeviceError",
    "EmpiricalFIM",
    "FIM_MonteCarlo",
    "FMatBlockDiag",
    "FMatDense",
    "FMatDiag",
    "FMatImplicit",
    "FMatSharded",
    "FVector",
    "FactoredTikhonov",
    "FileError",
    "FitWarning",
    "Gaussian",
    "GradientCovariance",
    "GramMatrices",
    "GramMatrix",
    "Hessian",
    "Influence",
    "Jacobian",
    "LayerCollection",
    "Likelihood",
    "LoaderError",
    "MatrixEstimate",
    "MemoryWarning",
    "MissingExtraError",
    "ModeError",
    "NNGeomError",
    "NonFiniteError",
    "OutputError",
    "PMatBlockDiag",
    "PMatDense",
    "PMatDiag",
    "PMatEKFAC",
    "PMatEye",
    "PMatImplicit",
    "PMatInFiles",
    "PMatKFAC",
    "PMatLowRank",
    "PMatMixed",
    "PMatQuasiDiag",
    "PMatSharded",
    "PVector",
    "PeerError",
    "Poisson",
    "PullBackDense",
    "PullBackImplicit",
    "PullBackSharded",
    "PushForwardDense",
    "PushForwardImplicit",
    "PushForwardSharded",
    "RankMismatchError",
    "Relative",
    "RepeatedExamplesWarning",
    "SameDataWarning",
    "SingularError",
    "SizeError",
    "StructureError",
    "Tikhonov",
    "UnevenBatchWarning",
    "UnsupportedError",
    "__version__",
    "approximation_report",
    "diagnose",
    "explain",
    "gradient_flow_mse",
    "influence",
    "kernel_regression",
    "load",
    "merge",
    "report",
    "rows",
    "save",
    "shard",
    "to_folder",
]

_trust()

_PACKAGES = ("analysis", "interop", "linearized", "mgs", "optim", "plot", "solve", "track")

if _typing.TYPE_CHECKING:
    from nngeom import analysis as analysis
    from nngeom import interop as interop
    from nngeom import linearized as linearized
    from nngeom import mgs as mgs
    from nngeom import optim as optim
    from nngeom import plot as plot
    from nngeom import solve as solve
    from nngeom import track as track
else:

    def __getattr__(name: str):
        """The subpackages, imported when they are first asked for: ``nng.analysis.coherence(...)``."""
        if name in _PACKAGES:
            import importlib

            return importlib.import_module(f"nngeom.{name}")
        raise AttributeError(f"module 'nngeom' has no attribute {name!r}")

    def __dir__():
        """Public names and subpackages, for completion."""
        return [*__all__, *_PACKAGES]

"""Every error of the library: what was given, what was expected, what to do.

All derive from :class:`NNGeomError` and from the builtin exception that fits, so that both
``except nng.NNGeomError`` and ``except ValueError`` work.
"""

from __future__ import annotations

import numbers
from typing import Any


class NNGeomError(Exception):
    """Base class of every error raised by ``nngeom``."""


class LoaderError(NNGeomError, ValueError):
    """The loader is empty, or a batch has a form that is not understood."""


class OutputError(NNGeomError, ValueError):
    """The model's outputs do not fit: not a tensor ``(n, ...)``, or not what the likelihood expects."""


class NonFiniteError(NNGeomError, ArithmeticError):
    """Outputs, gradients or statistics contain NaN or infinity."""


class ModeError(NNGeomError, RuntimeError):
    """The model couples examples or is random: batch normalisation or dropout in training mode."""


class CoverageError(NNGeomError, RuntimeError):
    """The assembled Jacobian differs from autograd's gradient: nothing is returned rather than a wrong number."""


class CollectionError(NNGeomError, ValueError):
    """Parameter selections that are empty, unknown, or do not belong together."""


class StructureError(NNGeomError, ValueError):
    """A representation cannot hold this parameter (too large a block, or used differently in different batches)."""


class DampingError(NNGeomError, ValueError):
    """Negative or non-finite damping."""


class SingularError(NNGeomError, ArithmeticError):
    """A solve, inverse or sample of a matrix that is singular or indefinite at this damping.

    ``message``: the text. ``needed`` is the damping above which it is positive definite, where that is known.
    """

    def __init__(self, message: str, needed: float | None = None) -> None:
        super().__init__(message)
        self.needed = needed


class ConvergenceError(NNGeomError, ArithmeticError):
    """An iterative method did not reach its tolerance.

    ``message``: the text. ``iterate`` is what was reached, of the type of the result, and ``residual`` its residuals
    relative to what they are of, one a vector, where these are known.
    """

    def __init__(self, message: str, iterate: Any = None, residual: Any = None):
        super().__init__(message)
        self.iterate, self.residual = iterate, residual


class SizeError(NNGeomError, MemoryError):
    """A dense result above the size limit."""


class ArgumentError(NNGeomError, ValueError):
    """An argument has a value that is not understood."""


class ArgumentTypeError(NNGeomError, TypeError):
    """An argument has a type that is not understood."""


class UnsupportedError(NNGeomError, NotImplementedError):
    """The operation is not offered by this object; the text names one that is."""


class DeviceError(NNGeomError, RuntimeError):
    """Tensors or parameters on different devices."""


class FileError(NNGeomError, OSError):
    """A file that is damaged, foreign, newer than this version, or cannot be written."""


class MissingExtraError(NNGeomError, ImportError):
    """An optional dependency is not installed; the text names the library."""


class PeerError(NNGeomError, RuntimeError):
    """Another process failed, or is gone, in a call that all processes of a group make together.

    ``message``: the text. ``rank``: of the process that failed, and ``kind``, what it raised there, where these are
    known.
    """

    def __init__(self, message: str, rank: int | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.rank, self.kind = rank, kind


class RankMismatchError(NNGeomError, RuntimeError):
    """The processes of a group were given different models, settings, vectors or calls."""


class SameDataWarning(UserWarning):
    """All processes of a group read the same first batch: was the data not split?"""


class UnevenBatchWarning(UserWarning):
    """The processes of a group train on batches of unlike sizes, and average over processes."""


class RepeatedExamplesWarning(UserWarning):
    """A sampler repeats examples so that all processes have as many; they count twice."""


class MemoryWarning(UserWarning):
    """The memory budget is below the smallest possible piece of work."""


class FitWarning(UserWarning):
    """What is fitted iteratively still moves: it is an approximation of the named kind, not the best of it."""


def not_added(other: Any, space: str) -> ArgumentTypeError:
    """The error for a sum, or difference, of a matrix of this ``space`` and something ``other`` that is none."""
    told = f"cannot add {type(other).__name__} to a {space} matrix, or subtract it; expected another one"
    if isinstance(other, numbers.Real) or getattr(other, "ndim", None) == 0:
        x = abs(float(other))
        told += f". To have {x:g} on the diagonal say damping= where the matrix is used, M.solve(v, damping={x:g})"
    return ArgumentTypeError(told)

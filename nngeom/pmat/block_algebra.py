"""What a block may have besides its primitives: parts, functions of its eigenvalues, another diagonal.

Defaults say what there is none of; each kind of block overrides where the result is closed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, StructureError, UnsupportedError

if TYPE_CHECKING:
    from nngeom.pmat.block import Block

Remake = Callable[[Tensor], "Block"]  # of eigenvalues [s, o, i], in the order they were given, to a block


class BlockAlgebra:
    """Operations that not every kind of block is closed under."""

    of_diagonal: ClassVar[Callable[[Tensor], Block]]  # the block of a diagonal, registered where that kind is

    @abstractmethod
    def eigh(self) -> tuple[Tensor, Any]:
        """Eigenvalues ``[s, o, i]`` and the orthonormal basis."""

    def restricted(self, columns: list[int]) -> Block:
        """The principal submatrix over ``[s, o, columns]``; raises :class:`StructureError` where it has no kind."""
        raise StructureError(
            f"the parameters that were asked for are a part of a {type(self).__name__}, which has no part of its kind; "
            "ask for all parameters of that block together, M[[name, ...]]"
        )

    def plus_diagonal(self, d: Tensor) -> Block | None:
        """``M + diag(d)``, ``d [s, o, i]``; ``None`` where that is of another kind."""
        return None

    def spectrum(self) -> tuple[Tensor, Remake]:
        """Eigenvalues ``[s, o, i]``, and what makes the block with others in the same eigenbasis."""
        raise UnsupportedError(
            f"a {type(self).__name__} has no functions of its eigenvalues; use PMatDense, or give it spectrum()"
        )

    def spectral_norm(self) -> Tensor:
        """The largest absolute eigenvalue."""
        return largest(self.eigh()[0])

    def factor_power(self, p: float) -> Block | None:
        """``M^p`` in a form of its own; ``None``: it is made of the eigenvalues."""
        return None


def largest(values: Tensor) -> Tensor:
    """The largest absolute value, 0 of none."""
    return values.abs().max() if values.numel() else values.sum()


def same(values: Tensor, what: str) -> Tensor:
    """The one value of equal eigenvalues; raises :class:`ArgumentError` where they were made unequal."""
    first = values.flatten()[0]
    if bool((values - first).abs().max() > 16 * torch.finfo(values.dtype).eps * values.abs().max()):
        raise ArgumentError(
            f"the function gives different values to equal eigenvalues of {what}, from {values.min().item():.6e} to "
            f"{values.max().item():.6e}; expected a function of the eigenvalue"
        )
    return first

"""The whole kernel, and one block an output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nngeom.core import pairs
from nngeom.core.errors import ArgumentError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.tile import Tile
from nngeom.fmat.fmat import FMat
from nngeom.fmat.operator import FunctionOperator
from nngeom.space.fvector import FVector

Blocks = Iterable[tuple[str, LayerJacobian, LayerJacobian]]  # group, rows of the left examples, rows of the right


def require_ndim(tensor: Tensor, kind: str, shape: str, ndim: int) -> None:
    """Raise unless ``tensor`` has ``ndim`` axes."""
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(f"a {kind} has shape {shape}; got {given}")


def summed(parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of the parts of each name."""
    totals: dict[str, Tensor] = {}
    for name, part in parts:
        totals[name] = totals[name] + part if name in totals else part
    return totals


@dataclass(frozen=True, eq=False, repr=False)
class FMatDense(FMat):
    """All entries: ``tensor[k, n, l, m]``, the product of the gradients of output ``k`` at ``n`` and ``l`` at ``m``."""

    tensor: Tensor  # [c n c m]

    diagonal: ClassVar[bool] = False

    @staticmethod
    def doubly_centred(tensor: Tensor) -> Tensor:
        """A square kernel, a ``tensor`` of this kind, with the mean over examples subtracted on both sides."""
        tensor = tensor - tensor.mean(1, keepdim=True)
        return tensor - tensor.mean(3, keepdim=True)

    @staticmethod
    def sizes(c: int, n: int, m: int) -> tuple[int, ...]:
        """The shape of ``tensor`` for ``c`` outputs, ``n`` rows and ``m`` columns."""
        return c, n, c, m

    @staticmethod
    def place(k: slice, n: slice, l: slice, m: slice) -> tuple[slice, ...]:
        """Where the tile of outputs ``k``, ``l`` and examples ``n``, ``m`` lies in ``tensor``."""
        return k, n, l, m

    @staticmethod
    def tiles(blocks: Blocks, k: slice, l: slice, *, graph: bool, by_examples: bool) -> dict[str, Tensor]:
        """``{group: tile}``, summed over ``blocks (group, x, y)``; ``k``, ``l``: the outputs of their rows. With
        ``graph`` nothing is overwritten.

        ``by_examples``: the order that products are added up in, as for :class:`~nngeom.core.tile.Tile`.
        """
        if graph:
            return summed((name, x.gram(y)) for name, x, y in blocks)
        totals: dict[str, Tile] = {}
        for name, x, y in blocks:
            if name not in totals:
                totals[name] = Tile(x, y, by_examples=by_examples)
            pairs.add(totals[name], x, y)
            del x, y  # so that their memory is free for the next
        return {name: tile.result() for name, tile in totals.items()}

    @staticmethod
    def centred(tile: Tensor, ax: Tensor, ay: Tensor, squares: Tensor, k: slice, l: slice) -> Tensor:
        """The ``tile`` of centred gradients, from products with the mean gradients ``ax [k, n, c]``, ``ay [l, m, c]``,
        ``squares [c, c]``.
        """
        return (
            tile - ax[..., l].unsqueeze(-1) - ay[..., k].permute(2, 0, 1).unsqueeze(1) + squares[k, l][:, None, :, None]
        )

    @staticmethod
    def mirror(tile: Tensor) -> Tensor:
        """The ``tile`` on the other side of the diagonal."""
        return tile.permute(2, 3, 0, 1)

    def __post_init__(self) -> None:
        require_ndim(self.tensor, "FMatDense", "(c, n, c, m)", 4)
        if self.tensor.shape[0] != self.tensor.shape[2]:
            raise ArgumentError(f"an FMatDense has as many outputs on both sides; got {tuple(self.tensor.shape)}")

    @property
    def outputs(self) -> int:
        return self.tensor.shape[0]

    @property
    def rows(self) -> int:
        return self.tensor.shape[1]

    @property
    def columns(self) -> int:
        return self.tensor.shape[3]

    def product(self, f: Tensor) -> Tensor:
        return (f.flatten(-2) @ self._dense().T).unflatten(-1, (self.outputs, self.rows))

    def _dense(self) -> Tensor:
        return self.tensor.reshape(self.shape)

    @property
    def T(self) -> FMatDense:
        return FMatDense(self.tensor.permute(2, 3, 0, 1))

    def added(self, other: FunctionOperator) -> FunctionOperator:
        if isinstance(other, FMat):
            return FMatDense(self.tensor + other.to_dense(max(other.shape)).view(self.tensor.shape))
        return super().added(other)

    def diag(self) -> FVector:
        self._require_square("diag")
        return FVector(self._dense().diagonal().view(self.outputs, self.rows))

    def _symmetric_parts(self) -> Tensor:
        return self._dense().unsqueeze(0)


@dataclass(frozen=True, eq=False, repr=False)
class FMatBlockDiag(FMat):
    """One block an output: ``tensor[k, n, m]``; products of gradients of different outputs are dropped."""

    tensor: Tensor  # [c n m]

    diagonal: ClassVar[bool] = False
    wider: ClassVar[type[FMat]] = FMatDense

    @staticmethod
    def doubly_centred(tensor: Tensor) -> Tensor:
        """A square kernel, a ``tensor`` of this kind, with the mean over examples subtracted on both sides."""
        tensor = tensor - tensor.mean(1, keepdim=True)
        return tensor - tensor.mean(2, keepdim=True)

    @staticmethod
    def sizes(c: int, n: int, m: int) -> tuple[int, ...]:
        """The shape of ``tensor`` for ``c`` outputs, ``n`` rows and ``m`` columns."""
        return c, n, m

    @staticmethod
    def place(k: slice, n: slice, l: slice, m: slice) -> tuple[slice, ...]:
        """Where the tile of outputs ``k``, ``l`` and examples ``n``, ``m`` lies in ``tensor``: the outputs common to
        both sides.
        """
        return slice(max(k.start, l.start), min(k.stop, l.stop)), n, m

    @staticmethod
    def tiles(blocks: Blocks, k: slice, l: slice, *, graph: bool, by_examples: bool) -> dict[str, Tensor]:
        """``{group: tile}``, summed over ``blocks (group, x, y)``, output by output; ``k``, ``l``: the outputs of their
        rows.

        ``graph``, ``by_examples``: for :class:`FMatDense` alone, these products are made one way.
        """
        both = range(max(k.start, l.start), min(k.stop, l.stop))

        def product(x: LayerJacobian, y: LayerJacobian) -> Tensor:
            return torch.stack(
                [
                    x.cotangents(j - k.start, j - k.start + 1).gram(y.cotangents(j - l.start, j - l.start + 1))[0, :, 0]
                    for j in both
                ]
            )

        return summed((name, product(x, y)) for name, x, y in blocks)

    @staticmethod
    def centred(tile: Tensor, ax: Tensor, ay: Tensor, squares: Tensor, k: slice, l: slice) -> Tensor:
        """The ``tile`` of centred gradients, as for :class:`FMatDense`: ``ax``, ``ay``, ``squares`` and the outputs
        ``k``, ``l``.
        """
        both = torch.arange(max(k.start, l.start), min(k.stop, l.stop), device=tile.device)
        left, right = ax[both - k.start, :, both], ay[both - l.start, :, both]
        return tile - left.unsqueeze(-1) - right.unsqueeze(1) + squares[both, both][:, None, None]

    @staticmethod
    def mirror(tile: Tensor) -> Tensor:
        """The ``tile`` on the other side of the diagonal."""
        return tile.mT

    def __post_init__(self) -> None:
        require_ndim(self.tensor, "FMatBlockDiag", "(c, n, m)", 3)

    @property
    def outputs(self) -> int:
        return self.tensor.shape[0]

    @property
    def rows(self) -> int:
        return self.tensor.shape[1]

    @property
    def columns(self) -> int:
        return self.tensor.shape[2]

    def product(self, f: Tensor) -> Tensor:
        return (self.tensor @ f.unsqueeze(-1)).squeeze(-1)

    def _dense(self) -> Tensor:
        return torch.block_diag(*self.tensor)

    @property
    def T(self) -> FMatBlockDiag:
        return FMatBlockDiag(self.tensor.mT)

    def widened(self) -> FMatDense:
        return FMatDense(self._dense().view(self.outputs, self.rows, self.outputs, self.columns))

    def diag(self) -> FVector:
        self._require_square("diag")
        return FVector(self.tensor.diagonal(dim1=1, dim2=2))

    def _symmetric_parts(self) -> Tensor:
        return self.tensor

"""A representation, made of a new kind of blocks: one number an output unit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.pmat import Block, Identity, PMat, reciprocal


@dataclass(frozen=True, eq=False)
class UnitEye(Block):
    """A multiple ``c [s, o, 1]`` of the identity over the ``i`` incoming weights (and bias) of every unit."""

    c: Tensor
    i: int
    sizes = property(lambda self: torch.Size((*self.c.shape[:2], self.i)))
    mv = lambda self, x: self.c * x
    diag = lambda self: self.c.expand(self.sizes)
    squared_norm = lambda self: self.i * self.c.square().sum()
    scaled = lambda self, x: UnitEye(x * self.c, self.i)
    added = lambda self, other: UnitEye(self.c + other.c, self.i) if isinstance(other, UnitEye) else None
    inverse = lambda self, damping: UnitEye(reciprocal(self.c, damping, "the unit-wise matrix"), self.i)
    eigh = lambda self: (self.diag(), Identity())


class PMatUnitEye(PMat):
    """A multiple of the identity for every output unit, with the right trace."""

    @classmethod
    def recipe(cls, selection):
        """One sweep: sums over the examples of a chunk are asked for, and their means over all of them come back."""
        squares = lambda rows: {"c": rows.square().mean(-1, keepdim=True)}
        means = yield lambda chunk: {layout: squares(rows) for layout, rows in chunk.jacobians.items()}
        return {layout: UnitEye(t["c"], layout.sizes[-1]) for layout, t in means.items()}

    @classmethod
    def entries_of(cls, layout, rows, selection):
        """For ``nng.explain``; parameters that the data does not use keep a zero."""
        return 1 if rows is None else layout.numel // layout.sizes[-1]

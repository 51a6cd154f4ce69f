"""Jacobians of which every process keeps the rows of its own examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.core.linear import linear
from nngeom.fmat.estimated import told_of
from nngeom.fmat.places import Places
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.ranks.fingerprint import bits
from nngeom.ranks.totals import require_same_vectors, totals
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False, repr=False)
class ShardedMap(JacobianMap):
    """``strip[k, n]``, the rows of this process's examples, over ``layer_collection``: ``(c, n, d)``; ``places``: how
    many examples each process has. Every product is a collective: all processes call it, in the same order, with the
    same vectors.
    """

    layer_collection: LayerCollection
    strip: Tensor  # [c n d]
    places: Places

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.strip.shape[0], self.places.total, self.strip.shape[2]

    @property
    def dtype(self) -> Any:
        return self.strip.dtype

    @property
    def device(self) -> Any:
        return self.strip.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same elsewhere, or in another dtype."""
        return replace(self, strip=self.strip.to(*args, **kwargs))

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, strip=c * self.strip)

    def added(self, other: JacobianMap) -> JacobianMap:
        if not isinstance(other, ShardedMap):
            raise self._refuse(f"sum with a {type(other).__name__}")
        if (other.places.team.ranks, other.places.counts) != (self.places.team.ranks, self.places.counts):
            raise ArgumentError(
                f"maps with {self.places.counts} and {other.places.counts} examples on the processes do not add; "
                "expected the same split"
            )
        return replace(self, strip=self.strip + other.strip)

    def norm(self) -> Tensor:
        own = lambda: ([self.strip.detach().square().sum()], 1)
        return totals(self.places.team, "norm", own)[0][0].sqrt()

    def __getitem__(self, name: str) -> Tensor:
        place, shape = self.place(name)
        return self.places.whole(self.strip[..., place]).view(*self.shape[:2], *shape)

    def times(self, other: Any) -> Any:
        """The product with a vector ``other``."""
        if isinstance(other, JacobianMap):
            raise self._refuse("product with another map")
        return self.mv(other)

    def forth(self, v: Tensor) -> Tensor:
        """``J v``: ``(*batch, d) -> (*batch, c, n)``."""
        with self.places.team.together("product") as note:
            note.mine = bits([v])
            own = v @ self.strip.flatten(0, 1).T
        require_same_vectors("product", note.all)
        c, n, _ = self.shape
        rows = self.places.whole(own.reshape(math.prod(v.shape[:-1]) * c, self.strip.shape[1]))
        return rows.view(*v.shape[:-1], c, n)

    def back(self, u: Tensor) -> Tensor:
        """``J^T u``: ``(*batch, c, n) -> (*batch, d)``."""
        own = lambda: ([u[..., self.places.mine].flatten(-2) @ self.strip.flatten(0, 1)], 1)
        return totals(self.places.team, "product", own, [u])[0][0]

    def _refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"a sharded map has no {what}; GramMatrix(sharded=True) is J J^T, GGN and FIM are matrices J^T M J, and "
            "materialize() gives all rows to every process"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError("a sharded map belongs to its processes and is not pickled; materialize() it first")

    def __repr__(self) -> str:
        return f"{super().__repr__()}, {self.strip.shape[1]} rows here{told_of(self.places.team)}"


class PushForwardSharded(ShardedMap):
    """``J``, its rows on the processes that have their examples: ``strip (c, n, d)`` those of this one, over
    ``layer_collection``, ``places`` how many each has.
    """

    pushes = True

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``, the same on every process."""
        return FVector(linear(self.forth, self.back, self._vector(v)))

    def map_rows(self, f: Callable[[PVector], PVector]) -> PushForwardSharded:
        """``f`` on all rows at once, by each process on its own: ``M @ J`` and ``M.solve(J, damping)``."""
        return replace(self, strip=f(PVector(self.layer_collection, self.strip)).flat())

    @property
    def T(self) -> PullBackSharded:
        """``J^T``."""
        return PullBackSharded(self.layer_collection, self.strip, self.places)

    def materialize(self) -> PushForwardDense:
        """The same map with all its rows on every process."""
        return PushForwardDense(self.layer_collection, self.places.whole(self.strip))


class PullBackSharded(ShardedMap):
    """``J^T``; holds the rows of the push-forward that it transposes: ``strip (c, n, d)`` those of this process, over
    ``layer_collection``, ``places`` how many each has.
    """

    pushes = False

    def mv(self, u: FVector) -> PVector:
        """``J^T u``, batched: ``(*batch, c, n) -> (*batch, d)``, the same on every process."""
        return PVector(self.layer_collection, linear(self.back, self.forth, self._function(u)))

    @property
    def T(self) -> PushForwardSharded:
        """``J``."""
        return PushForwardSharded(self.layer_collection, self.strip, self.places)

    def materialize(self) -> PullBackDense:
        """The same map with all its rows on every process."""
        return self.T.materialize().T

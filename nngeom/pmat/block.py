"""A symmetric matrix over one block of parameters, acting on ``x [*b, s, o, i]``. Knows nothing of networks.

Primitives: ``mv, diag, squared_norm, scaled, inverse, eigh``; the rest follows. Blocks are frozen and hold tensors;
what acts is always the exact matrix, ``inverse(damping)`` is a block again.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import memory
from nngeom.core.completed import CompletedBasis
from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.layout import Layout
from nngeom.core.registry import Registry
from nngeom.pmat.block_algebra import BlockAlgebra, Remake, same
from nngeom.pmat.eigenvalues import reciprocal, shifted_logdet

PIECE = memory.CACHE_BYTES // 8  # of rows that are turned at once; four times as many take up to 1.6 of the time


class TensorObject:
    """A frozen dataclass of tensors and plain values: moves and serialises field by field."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Another dtype or device, as ``Tensor.to``."""
        return self.map_tensors(lambda t: t.to(*args, **kwargs))

    def detach(self) -> Self:
        """Without its graph."""
        return self.map_tensors(lambda t: t.detach())

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same object with ``f`` of every tensor."""
        fields: dict[str, Any] = {name: f(t) for name, t in self.fields().items() if isinstance(t, Tensor)}
        fields |= {name: tuple(map(f, ts)) for name, ts in self.fields().items() if isinstance(ts, tuple)}
        fields |= {name: b.map_tensors(f) for name, b in self.fields().items() if isinstance(b, CompletedBasis)}
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def fields(self) -> dict[str, Any]:
        """Name to value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors held, those in tuples too."""
        for value in self.fields().values():
            value = tuple(value.tensors()) if isinstance(value, CompletedBasis) else value
            yield from (t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))


class Block(TensorObject, BlockAlgebra, ABC):
    """One block ``[s, o, i] x [s, o, i]`` of a parameter-space matrix."""

    kinds: ClassVar[Registry[type[Block]]] = Registry()  # by qualified name, for files

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Block.kinds.add(cls)

    @abstractmethod
    def mv(self, x: Tensor) -> Tensor:
        """``M x``, ``[*b, s, o, i]``."""

    @abstractmethod
    def diag(self) -> Tensor:
        """``[s, o, i]``."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """``|M|_F**2``."""

    @abstractmethod
    def scaled(self, c: float | Tensor) -> Block:
        """``c M``."""

    @abstractmethod
    def inverse(self, damping: Damping) -> Block:
        """``(M + damping)^-1``; raises :class:`SingularError`."""

    @abstractmethod
    def eigh(self) -> tuple[Tensor, BlockBasis]:
        """Eigenvalues ``[s, o, i]`` in no particular order, and the orthonormal basis ``M = U diag(values) U^T``."""

    def added(self, other: Block) -> Block | None:
        """``M + other`` when it is a block of the same kind, else ``None``."""
        return None

    # -- derived -------------------------------------------------------------------------------------------------------

    def merged(self, other: Block, mine: float, theirs: float) -> Block | None:
        """The block of two data sets together, this and ``other``, whose shares of the examples are ``mine`` and
        ``theirs``; ``None`` where that is not known.
        """
        return self.scaled(mine).added(other.scaled(theirs))

    @property
    def sizes(self) -> torch.Size:
        """``(s, o, i)``."""
        return self.diag().shape

    def trace(self) -> Tensor:
        """Sum of the diagonal."""
        return self.diag().sum()

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        """``(M + damping)^-1 b``."""
        return self.inverse(damping).mv(b)

    def dense(self) -> Tensor:
        """``[p, p]`` over the flattened block."""
        d = self.diag()
        eye = torch.eye(d.numel(), dtype=d.dtype, device=d.device)
        return self.mv(eye.view(-1, *d.shape)).flatten(1).T.contiguous()

    def logdet(self, damping: Tikhonov) -> Tensor:
        """``log det(M + damping I)``; ``-inf`` when singular or indefinite."""
        return shifted_logdet(self.eigh()[0], damping)

    def root_times(self, noise: Tensor, damping: Tikhonov) -> Tensor:
        """``(M + damping I)^-1/2 noise`` up to a rotation, for sampling."""
        values, basis = self.eigh()
        return basis.mv(noise * reciprocal(values, damping, "the matrix to sample from").sqrt())


class BlockBasis(TensorObject, ABC):
    """An orthonormal basis of one block, ``U``."""

    @abstractmethod
    def mv(self, x: Tensor) -> Tensor:
        """``U x``: coordinates to parameters, ``[*b, s, o, i]``."""

    @abstractmethod
    def tmv(self, x: Tensor) -> Tensor:
        """``U^T x``: parameters to coordinates."""

    def columns_of(self, r: Tensor, layout: Layout, scale: Tensor) -> Iterator[Tensor]:
        """``scale * U^T r``, without a graph, of what rows ``r [m, d]`` have at the places of a ``layout``: columns
        ``[m, q]``, some at a time, in any order.
        """
        out = r.new_empty(len(r), *scale.shape)
        for lo, hi in memory.pieces(len(r), scale.numel() * r.element_size(), most=PIECE):
            torch.mul(scale, self.tmv(layout.gather(r[lo:hi])), out=out[lo:hi])
        yield out.flatten(1)


@dataclass(frozen=True, eq=False)
class Identity(BlockBasis):
    """The parameters themselves."""

    def mv(self, x: Tensor) -> Tensor:
        return x

    def tmv(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class EyeBlock(Block):
    """``c x`` for ``x [s, o, i]``; with ``c = 0`` the block of parameters that the data does not use."""

    c: Tensor  # []
    s: int
    o: int
    i: int

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((self.s, self.o, self.i))

    def mv(self, x: Tensor) -> Tensor:
        return self.c * x

    def diag(self) -> Tensor:
        return self.c.expand(self.sizes)

    def squared_norm(self) -> Tensor:
        return self.c.square() * self.sizes.numel()

    def scaled(self, c: float | Tensor) -> EyeBlock:
        return EyeBlock(c * self.c, self.s, self.o, self.i)

    def added(self, other: Block) -> EyeBlock | None:
        return EyeBlock(self.c + other.c, self.s, self.o, self.i) if isinstance(other, EyeBlock) else None

    def inverse(self, damping: Damping) -> EyeBlock:
        return self._times(reciprocal(self.c.view(1), damping, "the multiple of the identity")[0])

    def eigh(self) -> tuple[Tensor, Identity]:
        return self.diag(), Identity()

    def restricted(self, columns: list[int]) -> EyeBlock:
        return EyeBlock(self.c, self.s, self.o, len(columns))

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.diag(), lambda f: self._times(same(f, "a multiple of the identity") if f.numel() else self.c)

    def plus_diagonal(self, d: Tensor) -> Block:
        return type(self).of_diagonal(self.c + d)

    def _times(self, c: Tensor) -> EyeBlock:
        return EyeBlock(c, self.s, self.o, self.i)

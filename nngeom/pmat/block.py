"""A symmetric matrix over one block of parameters, acting on ``x [*b, s, o, i]``. Knows nothing of networks.

Primitives: ``mv, diag, squared_norm, scaled, inverse, eigh``; the rest follows. Blocks are frozen and hold tensors;
what acts is always the exact matrix, ``inverse(damping)`` is a block again.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Cutoff, Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.registry import Registry

SPECTRUM_LIMIT = 4096  # a longer side takes too long for an error to say how much damping is needed


class TensorObject:
    """A frozen dataclass of tensors and plain values: moves and serialises field by field."""

    def to(self, *args: Any, **kwargs: Any):
        """Another dtype or device, as ``Tensor.to``."""
        return self.map_tensors(lambda t: t.to(*args, **kwargs))

    def detach(self):
        """Without its graph."""
        return self.map_tensors(lambda t: t.detach())

    def map_tensors(self, f):
        """The same object with ``f`` of every tensor."""
        fields: dict[str, Any] = {name: f(t) for name, t in self.fields().items() if isinstance(t, Tensor)}
        fields |= {name: tuple(map(f, ts)) for name, ts in self.fields().items() if isinstance(ts, tuple)}
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def fields(self) -> dict[str, Any]:
        """Name to value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors held, those in tuples too."""
        for value in self.fields().values():
            yield from (t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))


class Block(TensorObject, ABC):
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
        """``log det(M + damping I)``; ``-inf`` when singular."""
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


@dataclass(frozen=True, eq=False)
class Identity(BlockBasis):
    """The parameters themselves."""

    def mv(self, x):
        return x

    def tmv(self, x):
        return x


@dataclass(frozen=True, eq=False)
class EyeBlock(Block):
    """``c x``; with ``c = 0`` the block of parameters that the data does not use."""

    c: Tensor  # []
    s: int
    o: int
    i: int

    @property
    def sizes(self):
        return torch.Size((self.s, self.o, self.i))

    def mv(self, x):
        return self.c * x

    def diag(self):
        return self.c.expand(self.sizes)

    def squared_norm(self):
        return self.c.square() * self.sizes.numel()

    def scaled(self, c):
        return EyeBlock(c * self.c, self.s, self.o, self.i)

    def added(self, other):
        return EyeBlock(self.c + other.c, self.s, self.o, self.i) if isinstance(other, EyeBlock) else None

    def inverse(self, damping):
        return EyeBlock(reciprocal(self.c.view(1), damping, "the multiple of the identity")[0], self.s, self.o, self.i)

    def eigh(self):
        return self.diag(), Identity()


def reciprocal(values: Tensor, damping: Damping, what: str) -> Tensor:
    """``1 / (values + damping)``, or the pseudo-inverse under :class:`Cutoff`; raises :class:`SingularError`."""
    if isinstance(damping, Cutoff):
        keep = values >= max(damping.value, torch.finfo(values.dtype).tiny)
        return torch.where(keep, 1 / torch.where(keep, values, torch.ones_like(values)), torch.zeros_like(values))
    shifted = values + damping.value
    require_positive(shifted, values, what)
    return 1 / shifted


def require_positive(shifted: Tensor, values: Tensor, what: str) -> None:
    """Raise unless all of ``shifted`` is above rounding error of ``values``."""
    if not values.numel():
        return
    floor, least = rounding(values), shifted.min()
    if bool(least <= floor):
        need = ((shifted - values).max() - least + floor).item()
        raise SingularError(
            f"{what} is singular or indefinite at this damping: its smallest eigenvalue is {least.item():.3e}; "
            f"use a damping above {max(need, 0.0):.3e}, or Cutoff(x) for a pseudo-inverse",
            max(need, 0.0),
        )


def definite_factor(m: Tensor, damping: Damping, what: str) -> Tensor:
    """The Cholesky factor of ``m + damping I``, ``m [..., p, p]``; raises :class:`SingularError` with the need."""
    try:
        return linalg.cholesky(*shifted(m, damping, what))
    except SingularError:
        if m.shape[-1] <= SPECTRUM_LIMIT:
            values = torch.linalg.eigvalsh(m.detach().double()).to(m.dtype)
            require_positive((values + damping.value).detach(), values, what)
        raise


def shifted(m: Tensor, damping: Damping, what: str) -> tuple[Tensor, str]:
    """``m + damping I``, and what to call it where it is singular."""
    total = m.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(damping.value)
    return total, f"{what} with damping {damping.value:g}"


def rounding(values: Tensor) -> Tensor:
    """What of eigenvalues counts as zero: their rounding error, 4 units in the last place of the largest."""
    return 4 * torch.finfo(values.dtype).eps * values.abs().max()


def shifted_logdet(values: Tensor, damping: Tikhonov) -> Tensor:
    """``sum log(values + damping)``; without damping ``-inf`` where :func:`require_positive` raises."""
    shifted = values + damping.value
    if values.numel() and not damping.value > 0:
        shifted = torch.where(values <= rounding(values), torch.zeros_like(values), shifted)
    return log_sum(shifted)


def log_sum(shifted: Tensor) -> Tensor:
    """``sum log``; ``-inf`` where one is not positive."""
    return shifted.clamp_min(0).log().sum()


def zero_small(values: Tensor) -> Tensor:
    """Eigenvalues within rounding error of zero set to zero, so that the log-determinant of a singular matrix is
    ``-inf``.
    """
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values.abs() <= floor, torch.zeros_like(values), values)

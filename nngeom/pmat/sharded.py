"""A matrix of blocks of which every process keeps those of its own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Cutoff
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linear import symmetric
from nngeom.pmat.arguments import is_spectral, require_frobenius
from nngeom.pmat.block import Block
from nngeom.pmat.damped import damped, require_added
from nngeom.pmat.in_parts import InParts
from nngeom.pmat.operands import V
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import as_representation
from nngeom.pmat.selected import moved
from nngeom.ranks.collected import collected
from nngeom.ranks.fingerprint import bits
from nngeom.ranks.team import Team
from nngeom.ranks.totals import generator_of, require_same_vectors, totals
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

Act = Callable[[PMat, Tensor], Tensor]  # of a part, on the entries [*b, p] of a vector that are its


@dataclass(frozen=True, eq=False, repr=False)
class PMatSharded(ParameterOperator):
    """``PMatSharded.of(representation)`` is a representation; measured with it, a matrix whose ``parts``, each a matrix
    over some layers, are kept by the processes that own these.

    ``layer_collection``: all of them; ``owners``: the parameters of every rank; ``examples``: how many it is a mean
    over; ``like``: an empty tensor of its dtype on its device. Every method is a collective: all processes of the
    ``team`` call it, in the same order, with the same vectors; results are whole everywhere.
    """

    layer_collection: LayerCollection
    parts: tuple[PMat, ...]
    owners: tuple[tuple[str, ...], ...]
    examples: int
    team: Team
    like: Tensor

    @staticmethod
    def of(representation: Any, *, streamed: bool = False, **options: Any) -> InParts[PMatSharded]:
        """What is passed as ``representation``: one with a block a layer (``PMatKFAC``, ``PMatEKFAC``,
        ``PMatBlockDiag``, ``PMatQuasiDiag``) and its ``options``, in parts.

        As many layers are measured in one sweep over the data as ``memory_budget`` has room for twice. ``streamed``:
        all of them in one sweep, in which every process sends what it sees of a layer to the one that keeps it: fewer
        passes, more that is sent. Raises :class:`UnsupportedError` for others, whose blocks reach over layers.
        """
        whole = as_representation(representation, **options)
        if not whole.blocks_in_layers:
            raise UnsupportedError(
                f"PMatSharded has parts of layers, and a block of {whole.kind.__name__} reaches over several; expected "
                "PMatKFAC, PMatEKFAC, PMatBlockDiag or PMatQuasiDiag"
            )
        kind: Any = PMatSharded
        return InParts(kind, {}, whole, streamed)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    # -- vectors -------------------------------------------------------------------------------------------------------

    def _slices(self, names: Sequence[str]) -> list[slice]:
        return [slice(p.offset, p.stop) for p in self.layer_collection.span(names).pieces] if names else []

    def _joined(self, what: str, x: Tensor, act: Act) -> Tensor:
        """``act`` of every part on its entries of ``x [*b, d]``, put together."""
        out = torch.zeros_like(x)
        with self.team.together(what) as note:
            note.mine = bits([x]) if self.team.size > 1 else None
            for part in self.parts:
                slices = self._slices(part.layer_collection.names)
                y = act(part, torch.cat([x[..., s] for s in slices], -1))
                for s, t in zip(slices, y.split([s.stop - s.start for s in slices], -1)):
                    out[..., s] = t
        require_same_vectors(what, note.all)
        for rank, names in enumerate(self.owners):
            self.team.spread([out[..., s] for s in self._slices(names)], rank)
        return out

    def _drawn(self, generator: torch.Generator | None) -> torch.Generator | None:
        return generator_of(self.team, generator, self.device)

    def product(self, x: Tensor) -> Tensor:
        return symmetric(lambda y: self._joined("product", y, lambda part, z: part.product(z)), x)

    def diag(self) -> PVector:
        blank = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        return PVector(self.layer_collection, self._joined("diag", blank, lambda part, _: part.diag().flat()))

    def solve(self, b: V, damping: Any = 0.0, *, indefinite: bool = False) -> V:
        """``(M + damping I)^-1 b``; ``damping``, ``indefinite`` and errors as for :meth:`PMat.solve`, but no
        ``{pattern: number}`` and no ``Cutoff(top=)``.
        """
        d = self._damping(damping)
        act: Act = lambda part, y: part.solve(PVector(part.layer_collection, y), d(part), indefinite=indefinite).flat()
        return self._apply(lambda x: symmetric(lambda y: self._joined("solve", y, act), x), b)

    def sample(self, n: int, damping: Any = 0.0, generator: torch.Generator | None = None) -> PVector:
        """``n`` draws of ``N(0, (M + damping I)^-1)``, by rank 0's ``generator`` (torch's global one by default)."""
        drawn = generator_of(self.team, generator, self.device)
        device = self.device if drawn is None else drawn.device
        noise = PVector.randn(self.layer_collection, n, generator=drawn, dtype=self.dtype, device=device)
        d = self._damping(damping)

        def roots(part: PMat, y: Tensor) -> Tensor:
            out = torch.empty_like(y)
            for layout, (block, shift) in damped(part, d(part)).items():
                layout.scatter_(out, block.root_times(layout.gather(y), require_added(shift, "sample")))
            return out

        return PVector(self.layer_collection, self._joined("sample", noise.flat().to(self.device), roots))

    def _damping(self, damping: Any) -> Callable[[PMat], Any]:
        """What a damping is for every part."""
        _require_no_graph(damping.flat() if isinstance(damping, PVector) else getattr(damping, "value", damping))
        if isinstance(damping, PVector):
            flat = self.operand(damping)
            of: Callable[[Sequence[str]], Tensor] = lambda names: torch.cat([flat[s] for s in self._slices(names)])
            return lambda part: PVector(part.layer_collection, of(part.layer_collection.names))
        if isinstance(damping, Mapping) or (isinstance(damping, Cutoff) and damping.top is not None):
            raise UnsupportedError(
                f"damping is {damping!r}, of layers that several processes keep; expected a number, a PVector of one "
                "number a parameter, Relative(x), FactoredTikhonov(x) or Cutoff(x)"
            )
        return lambda part: damping

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _total(self, what: str, number: Callable[[PMat], Tensor]) -> Tensor:
        own: Callable[[], Tensor] = lambda: torch.stack([self.like.new_zeros(()), *map(number, self.parts)]).sum()
        return totals(self.team, what, lambda: ([own()], 1))[0][0]

    def trace(self) -> Tensor:
        return self._total("trace", lambda part: part.trace())

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, or the largest absolute eigenvalue, ``kind=2``; others raise :class:`ArgumentError`."""
        if is_spectral(kind):
            with self.team.together("norm") as note:
                note.mine = max([0.0, *(float(part.norm(2)) for part in self.parts)])
            return self.like.new_tensor(max(note.all))
        require_frobenius(kind)
        return self._total("norm", lambda part: part.norm().square()).sqrt()

    def logdet(self, damping: Any = 0.0) -> Tensor:
        """``log det(M + damping I)``, ``-inf`` when singular or indefinite."""
        d = self._damping(damping)
        return self._total("logdet", lambda part: part.logdet(d(part)))

    # -- matrices ------------------------------------------------------------------------------------------------------

    def _remade(self, what: str, f: Callable[[PMat], PMat]) -> Self:
        with self.team.together(what):
            return replace(self, parts=tuple(map(f, self.parts)))

    def inverse(self, damping: Any = 0.0, *, indefinite: bool = False) -> PMatSharded:
        """``(M + damping I)^-1`` in the same parts; ``damping``, ``indefinite``: as for :meth:`solve`."""
        d = self._damping(damping)
        return self._remade("inverse", lambda part: part.inverse(d(part), indefinite=indefinite))

    def scaled(self, c: float | Tensor) -> Self:
        _require_no_graph(c)
        return replace(self, parts=tuple(part.scaled(c) for part in self.parts))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        like = self.like.to(*args, **kwargs)
        return replace(self, parts=tuple(part.to(*args, **kwargs) for part in self.parts), like=like)

    def eigh(self) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise UnsupportedError(
            "a sharded matrix has its eigenvalues in parts: those of M.parts on each process, or gather(rank=0).eigh()"
        )

    def gather(self, rank: int | None = None) -> PMat | None:
        """The whole matrix on every process, or on ``rank`` alone and ``None`` elsewhere."""
        if rank is not None and (isinstance(rank, bool) or rank not in range(self.team.size)):
            raise ArgumentError(f"rank is {rank!r}; expected one of 0 to {self.team.size - 1}, or None for all")
        blocks: dict[Layout, Block] = {}
        kinds: set[type[PMat]] = set()
        for parts in collected(self.team, "gather", self.parts, self.device, rank):
            for part in parts:
                kinds.add(type(part))
                blocks |= {moved(layout, self.layer_collection): block for layout, block in part.blocks.items()}
        if rank not in (None, self.team.rank):
            return None
        order = {name: j for j, name in enumerate(self.layer_collection.names)}
        listed = dict(sorted(blocks.items(), key=lambda item: order[item[0].names[0]]))
        kind: type[PMat] = kinds.pop() if len(kinds) == 1 else PMat.makers[Block]
        return kind.of_blocks(self.layer_collection, listed, self.examples)

    def materialize(self) -> PMat:
        """The whole matrix on every process."""
        whole = self.gather()
        assert whole is not None
        return whole

    def nbytes(self) -> int:
        """Bytes of all tensors held by this process."""
        return sum(part.nbytes() for part in self.parts)

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a sharded matrix belongs to its processes and is not pickled; gather() it first, or nngeom.save(M, folder)"
        )

    def __repr__(self) -> str:
        own, of = sum(len(part.layer_collection) for part in self.parts), len(self.layer_collection)
        return (
            f"PMatSharded(shape={self.shape}, examples={self.examples}, dtype={self.dtype}, device='{self.device}'), "
            f"{own} of {of} parameters here, rank {self.team.rank} of {self.team.size}; collective"
        )


def _require_no_graph(x: Any) -> None:
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "a sharded matrix is differentiable in the vectors of its products only, and a damping or a factor "
            "requires a gradient; detach() it, or gather() the matrix"
        )

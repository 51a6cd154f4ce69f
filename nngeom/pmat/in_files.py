"""A matrix larger than memory: its parts, of some layers each, lie in files and are read when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.pmat.arguments import is_spectral, require_frobenius
from nngeom.pmat.basis import Basis
from nngeom.pmat.block import Block
from nngeom.pmat.damped import chosen_numbers, damped, entries_of, require_added, top_cutoff
from nngeom.pmat.operands import V
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.pmat.selected import moved
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

Change = Callable[[PMat], PMat]


@dataclass(frozen=True, eq=False, repr=False)
class PMatInFiles(ParameterOperator):
    """A block-diagonal matrix of which one part is in memory at a time: what :func:`to_folder` measured.

    It has the operations of the matrix that it is of, part by part, but for :meth:`eigh`; inverses and multiples are
    made anew whenever a part is read. Blocks lie within parts: that of a PMatDiag is cut, as :class:`Relative` sees.

    Over a ``layer_collection``, in ``parts``, collections of layers each with what reads its matrix, of ``kind``, a
    mean over so many ``examples``. What is read has ``entries`` of this dtype, at the ``place`` of this device, after
    all ``changes``.
    """

    layer_collection: LayerCollection
    parts: tuple[tuple[LayerCollection, Callable[[], PMat]], ...]
    kind: type[PMat]
    examples: int
    entries: torch.dtype
    place: torch.device
    changes: tuple[Change, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.entries

    @property
    def device(self) -> torch.device:
        return self.place

    def read(self) -> Iterator[tuple[LayerCollection, PMat]]:
        """Every part, one after the other."""
        for collection, part in self.parts:
            yield collection, self._changed(part())

    def _changed(self, part: PMat) -> PMat:
        for change in self.changes:
            part = change(part)
        return part

    def in_memory(self) -> PMat:
        """The same matrix with all its blocks in memory, of its own kind."""
        return self._whole(self.layer_collection)

    def _whole(self, chosen: LayerCollection) -> PMat:
        """Over some of the parameters: of the parts that have them."""
        blocks, kind = dict[Layout, Block](), self.kind
        for collection, part in self.parts:
            mine = collection.only([name for name in collection.names if name in chosen])
            if len(mine):
                matrix = self._changed(part())
                kind = type(matrix)
                some = matrix if len(mine) == len(collection) else matrix[list(mine.names)]
                blocks |= {moved(layout, chosen): block for layout, block in some.blocks.items()}
        return kind.of_blocks(chosen, blocks, self.examples)

    def __getitem__(self, pattern: Any) -> PMat:
        """The part over a layer, or over what another ``pattern`` means, in memory; as for any stored matrix."""
        return self._whole(self.layer_collection.part(pattern))

    def by_layer(self) -> LayersInFiles:
        """``{layer: its diagonal block}``, each read when it is asked for."""
        return LayersInFiles(self)

    # -- products ------------------------------------------------------------------------------------------------------

    def _each(self, x: Tensor, f: Callable[[PMat, Tensor], Tensor]) -> Tensor:
        out = torch.empty_like(x)
        for collection, part in self.read():
            place = self.layer_collection.span(collection.names)
            place.scatter_(out, f(part, place.gather(x)[..., 0, 0, :])[..., None, None, :])
        return out

    def product(self, x: Tensor) -> Tensor:
        return self._each(x, lambda part, y: part.product(y))

    def solve(self, b: V, damping: Any = 0.0, *, indefinite: bool = False) -> V:
        """``(M + damping I)^-1 b``, part by part; ``damping``, ``indefinite`` and errors as for :meth:`PMat.solve`."""
        chosen = self.dampings(damping)

        def solved(part: PMat, y: Tensor) -> Tensor:
            lc = part.layer_collection
            return part.solve(PVector(lc, y), chosen(lc), indefinite=indefinite).flat()

        return self._apply(lambda x: self._each(x, solved), b)

    def inverse(self, damping: Any = 0.0, *, indefinite: bool = False) -> PMatInFiles:
        """``(M + damping I)^-1``; of KFAC the factors are decomposed whenever a part is read, EKFAC keeps them so.

        ``indefinite``: with negative eigenvalues too.
        """
        chosen = self.dampings(damping)
        return self._with(lambda part: part.inverse(chosen(part.layer_collection), indefinite=indefinite))

    def dampings(self, damping: Any) -> Callable[[LayerCollection], Any]:
        """What a ``damping`` is in every part, by its parameters."""
        if isinstance(damping, PVector):
            flat, whole = entries_of(self, damping), self.layer_collection
            return lambda lc: PVector(lc, whole.span(lc.names).gather(flat)[0, 0])
        if isinstance(damping, Mapping):
            numbers = chosen_numbers(self.layer_collection, damping)
            return lambda lc: {name: numbers[name] for name in lc.names}
        if isinstance(damping, Cutoff) and damping.top is not None:
            least = top_cutoff(torch.cat([part.eigh()[0] for _, part in self.read()]).sort()[0], damping)
            return lambda lc: least
        return lambda lc: damping

    # -- numbers -------------------------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """``tr M``."""
        return torch.stack([part.trace() for _, part in self.read()]).sum()

    def diag(self) -> PVector:
        """The diagonal."""
        out = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for collection, part in self.read():
            self.layer_collection.span(collection.names).scatter_(out, part.diag().flat()[None, None])
        return PVector(self.layer_collection, out)

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, or the largest absolute eigenvalue, ``kind=2``."""
        if is_spectral(kind):
            return torch.stack([part.norm(2) for _, part in self.read()]).max()
        require_frobenius(kind)
        return torch.stack([part.norm().square() for _, part in self.read()]).sum().sqrt()

    def logdet(self, damping: Any = 0.0) -> Tensor:
        """``log det(M + damping I)``, ``-inf`` when singular or indefinite."""
        chosen = self.dampings(damping)
        return torch.stack([part.logdet(chosen(lc)) for lc, part in self.read()]).sum()

    def sample(self, n: int, damping: Any = 0.0, generator: torch.Generator | None = None) -> PVector:
        """``n`` draws of ``N(0, (M + damping I)^-1)``; ``generator``: torch's global one by default."""
        device = self.device if generator is None else generator.device
        noise = PVector.randn(self.layer_collection, n, generator=generator, dtype=self.dtype, device=device)
        chosen = self.dampings(damping)

        def drawn(part: PMat, x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for layout, (block, d) in damped(part, chosen(part.layer_collection)).items():
                layout.scatter_(out, block.root_times(layout.gather(x), require_added(d, "sample")))
            return out

        return PVector(self.layer_collection, self._each(noise.flat().to(self.device), drawn))

    def eigh(self) -> tuple[Tensor, Basis]:
        """Raises :class:`UnsupportedError`: eigenvectors of all parts at once are what does not fit into memory."""
        raise UnsupportedError(
            "eigenvectors of a matrix in files are those of its layers: M.by_layer()[layer].eigh(), or "
            "M.in_memory().eigh() where there is room for all of them"
        )

    # -- algebra -------------------------------------------------------------------------------------------------------

    def _with(self, change: Change) -> PMatInFiles:
        return replace(self, changes=(*self.changes, change))

    def scaled(self, c: float | Tensor) -> PMatInFiles:
        return self._with(lambda part: part.scaled(c))

    def power(self, p: float, damping: Any = 0.0) -> PMatInFiles:
        """``(M + damping I)^p``, part by part; as :meth:`PMat.power`."""
        chosen = self.dampings(damping)
        return self._with(lambda part: part.power(p, chosen(part.layer_collection)))

    def to(self, *args: Any, **kwargs: Any) -> PMatInFiles:
        """Another dtype or device of what is read, as ``Tensor.to``."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return replace(self._with(lambda part: part.to(*args, **kwargs)), entries=like.dtype, place=like.device)

    def __repr__(self) -> str:
        return (
            f"PMatInFiles({self.kind.__name__}, shape={self.shape}, parts={len(self.parts)}, "
            f"examples={self.examples}, dtype={self.dtype}, device='{self.device}')"
        )


class LayersInFiles(Mapping[str, PMat]):
    """``{layer: its diagonal block}`` of a matrix in files, read when asked for."""

    def __init__(self, matrix: PMatInFiles) -> None:
        self.matrix = matrix

    def __getitem__(self, layer: str) -> PMat:
        lc = self.matrix.layer_collection
        names = lc.by_layer().get(layer)
        if names is None:
            raise KeyError(layer)
        return self.matrix[list(names)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrix.layer_collection.by_layer())

    def __len__(self) -> int:
        return len(self.matrix.layer_collection.by_layer())


def require_stored(found: Any, measure: str) -> PMat:
    """What a ``measure`` gave for a part; raises :class:`ArgumentError` where that is no stored matrix."""
    if not isinstance(found, PMat):
        raise ArgumentError(
            f"a folder holds stored matrices, and {measure} gave a {type(found).__name__}; expected a measure of a "
            "stored representation"
        )
    return found

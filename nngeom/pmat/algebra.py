"""Parts and functions of a stored matrix, as its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Self

from nngeom.core.hand import InHand
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.pmat.functions import applied, powered
from nngeom.pmat.selected import blocks_within
from nngeom.space.collection import LayerCollection

if TYPE_CHECKING:
    from nngeom.pmat.pmat import PMat


class StoredAlgebra(InHand):
    """What blocks make easy; joins :class:`nngeom.pmat.pmat.PMat`."""

    layer_collection: LayerCollection
    blocks: dict[Layout, Block]
    examples: int

    if TYPE_CHECKING:  # of PMat

        def nbytes(self) -> int: ...

        def remade(self, blocks: dict[Layout, Block]) -> PMat: ...

        def __pow__(self, p: float) -> PMat: ...

        @classmethod
        def of_blocks(cls, collection: LayerCollection, blocks: dict[Layout, Any], examples: int) -> Self: ...

    def facts(self) -> dict[str, str]:
        """What is told of the whole: its shape, dtype and device, and the memory that it takes."""
        return {**InHand.facts(self), "memory": _bytes(self.nbytes())}

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """The parameters, the kind, the sides ``s x o x i`` and the memory of every block, one line each."""
        held = [sum(t.numel() * t.element_size() for t in block.tensors()) for block in self.blocks.values()]
        lines = [
            [_first(layout.names), type(block).__name__, " x ".join(map(str, layout.sizes)), _bytes(size)]
            for (layout, block), size in zip(self.blocks.items(), held)
        ]
        return ["parameters", "block", "side", "memory"], lines

    def __getitem__(self, pattern: Any) -> Self:
        """The principal submatrix over a layer, ``M["fc"]``, or over the parameters that another ``pattern`` means, of
        the same kind.

        Patterns as :meth:`LayerCollection.from_model` takes them. Raises :class:`CollectionError` where nothing
        matches, :class:`StructureError` for a part of a block that is no block of its kind.
        """
        return self._over(self.layer_collection.part(pattern))

    def by_layer(self) -> dict[str, Self]:
        """``{layer: its diagonal block}``, matrices of the same kind, each over the parameters of its layer."""
        lc = self.layer_collection
        return {layer: self._over(lc.only(names)) for layer, names in lc.by_layer().items()}

    def _over(self, part: LayerCollection) -> Self:
        blocks = blocks_within(self.blocks, self.layer_collection, part)
        return self.of_blocks(part, blocks, self.examples)

    def apply(self, f: Callable[[Tensor], Tensor]) -> PMat:
        """``f(M)``, ``f`` of the eigenvalues in the eigenbasis: a function of all of them, ``(d,)``, ascending, to as
        many numbers.

        Of the same kind where that is closed; of Kronecker factors in their eigenbasis, a PMatEKFAC. Raises
        :class:`ArgumentError` where ``f`` returns something else, or different values for eigenvalues that are one
        number (those outside of the rank of a PMatLowRank), :class:`NonFiniteError` where it is not finite.
        """
        return self.remade(applied(self, f))  # type: ignore[arg-type]

    def power(self, p: float, damping: Any = 0.0) -> PMat:
        """``(M + damping I)^p`` for a real number ``p``; of KFAC without ``damping`` a KFAC, ``G^p (x) A^p``.

        ``damping``: as for :meth:`solve`, what is added to the diagonal. Raises :class:`SingularError` for a negative
        power of a matrix that is not positive definite, and for a fractional one with negative eigenvalues.
        """
        return self.remade(powered(self, p, damping))  # type: ignore[arg-type]


def _first(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bytes(count: int) -> str:
    """A number of bytes in the largest unit that leaves one digit before the point."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"

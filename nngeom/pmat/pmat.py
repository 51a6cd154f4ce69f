"""Parameter-space matrices: the contract, and its one implementation as blocks over a partition of the parameters.

Dense, Diag, LowRank and Eye are one block over everything; BlockDiag, QuasiDiag, KFAC and EKFAC one a layer; Mixed
any of these. Representations differ in their recipe and in their blocks' algebra, nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import ArgumentTypeError, StructureError
from nngeom.core.layout import Layout
from nngeom.pmat.algebra import StoredAlgebra
from nngeom.pmat.arguments import is_spectral, require_frobenius
from nngeom.pmat.basis import Basis
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.damped import damped, require_added, worst_block
from nngeom.pmat.operands import V
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Measured
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False, init=False)
class PMat(StoredAlgebra, ParameterOperator, Measured):
    """A symmetric matrix over the parameters, as blocks over a partition of them. Frozen; holds tensors only."""

    layer_collection: LayerCollection
    blocks: dict[Layout, Block]
    examples: int

    makers: ClassVar[dict[type, type[PMat]]] = {}  # by the kind of blocks that a representation is made of

    def __init_subclass__(cls, made_of: type[Block] | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if made_of is not None:
            PMat.makers[made_of] = cls
        if "recipe" in vars(cls) and "entries" not in vars(cls):
            cls.entries = None  # what was said of the parent's recipe
        for said in ("projects", "any_columns", "layerwise", "blocks_in_layers"):
            if "recipe" in vars(cls) and said not in vars(cls):
                setattr(cls, said, False)
        PMat.kinds.add(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ArgumentTypeError(
            f"{type(self).__name__} is built by FIM(model, loader, {type(self).__name__}) and its like, not called"
        )

    @classmethod
    def of_blocks(cls, collection: LayerCollection, blocks: dict[Layout, Block], examples: int) -> Self:
        """A checked matrix: the ``blocks`` must partition the parameters of the ``collection``, missing ones are zero.

        ``examples``: how many they are means over. Raises :class:`StructureError` for a parameter in several blocks.
        """
        named = [name for layout in blocks for name in layout.names]
        twice = sorted({n for n in named if named.count(n) > 1}) if len(set(named)) < len(named) else []
        if twice:
            raise StructureError(
                f"parameters {twice[:4]} are used in different ways in different batches; {cls.__name__} needs "
                "one structure: "
                "use PMatDiag, PMatBlockDiag or PMatDense for them (PMatMixed)"
            )
        missing = [n for n in collection.names if n not in set(named)]
        if missing:
            like = next((block.diag() for block in blocks.values()), torch.zeros(()))
            blocks = dict(blocks)
            for name in missing:
                span = collection.span([name])
                blocks[span] = EyeBlock(like.new_zeros(()), *span.sizes)
        self = object.__new__(cls)
        for key, value in (("layer_collection", collection), ("blocks", blocks), ("examples", examples)):
            object.__setattr__(self, key, value)
        return self

    # -- primitives ----------------------------------------------------------------------------------------------------

    @property
    def _tensor(self) -> Tensor:
        return next(t for b in self.blocks.values() for t in b.tensors())

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    def _each(self, x: Tensor, f: Callable[[Any, Tensor], Tensor], parts: dict[Layout, Any]) -> Tensor:
        if len(parts) == 1:
            ((layout, part),) = parts.items()
            if layout.is_span and len(layout.pieces) == 1:
                return f(part, layout.gather(x)).reshape(x.shape)
        out = torch.empty_like(x)
        for layout, part in parts.items():
            layout.scatter_(out, f(part, layout.gather(x)))
        return out

    def flattened(self, parts: dict[Layout, Tensor]) -> Tensor:
        """``(d,)`` of one number ``[s, o, i]`` a parameter of every block, the ``parts``."""
        out = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for layout, x in parts.items():
            layout.scatter_(out, x)
        return out

    def product(self, x: Tensor) -> Tensor:
        return self._each(x, lambda block, y: block.mv(y), self.blocks)

    # -- numbers -------------------------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """``tr M``."""
        return torch.stack([b.trace() for b in self.blocks.values()]).sum()

    def diag(self) -> PVector:
        """The diagonal."""
        return PVector(self.layer_collection, self.flattened({lay: b.diag() for lay, b in self.blocks.items()}))

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, ``kind="fro"``, or the largest absolute eigenvalue, ``kind=2``; others raise
        :class:`ArgumentError`.
        """
        if is_spectral(kind):
            return torch.stack([b.spectral_norm() for b in self.blocks.values()]).max()
        require_frobenius(kind)
        return torch.stack([b.squared_norm() for b in self.blocks.values()]).sum().sqrt()

    def logdet(self, damping: Any = 0.0) -> Tensor:
        """``log det(M + damping I)``, ``-inf`` when singular or indefinite; ``damping``: as added by :meth:`solve`."""
        parts = damped(self, damping).values()
        return torch.stack([b.logdet(require_added(d, "logdet")) for b, d in parts]).sum()

    # -- inverses ------------------------------------------------------------------------------------------------------

    def solve(self, b: V, damping: Any = 0.0, *, indefinite: bool = False) -> V:
        """``(M + damping I)^-1 b`` for a PVector (batched) or all rows of a ``PushForwardDense``.

        ``damping``: a number or 0-d tensor, :class:`Relative`, ``{pattern: number}`` or a PVector of one number a
        parameter, all added to the diagonal, or :class:`FactoredTikhonov` or :class:`Cutoff`. ``indefinite``: with
        negative eigenvalues too. Raises :class:`SingularError` when the damped matrix is singular, or else indefinite.
        """
        parts = damped(self, damping, indefinite=indefinite)
        with worst_block(parts):
            return self._apply(lambda x: self._each(x, lambda part, y: part[0].solve(y, part[1]), parts), b)

    def inverse(self, damping: Any = 0.0, *, indefinite: bool = False) -> PMat:
        """``(M + damping I)^-1`` as a matrix; the factorisation is done here, once. ``damping``, ``indefinite``: as for
        :meth:`solve`.
        """
        parts = damped(self, damping, indefinite=indefinite)
        with worst_block(parts):
            return self.remade({layout: block.inverse(d) for layout, (block, d) in parts.items()})

    def remade(self, blocks: dict[Layout, Block]) -> PMat:
        """The matrix of new ``blocks`` in the same places, of the kind that these make."""
        return self._made_of(blocks).of_blocks(self.layer_collection, blocks, self.examples)

    def _made_of(self, blocks: dict[Layout, Block]) -> type[PMat]:
        """The representation of new blocks: this one's while their kinds stay, else the one made of them, or of any."""
        old, new = ({type(b) for b in bs.values()} for bs in (self.blocks, blocks))
        if new <= old:
            return type(self)
        any_blocks = PMat.makers[Block]
        return PMat.makers.get(new.pop(), any_blocks) if len(new) == 1 else any_blocks

    def eigh(self) -> tuple[Tensor, Basis]:
        """All eigenvalues ``(d,)``, ascending, and an orthonormal basis in the same order: ``M = U diag(values)
        U^T``.
        """
        parts = {lay: b.eigh() for lay, b in self.blocks.items()}
        flat = self.flattened({lay: values for lay, (values, _) in parts.items()})
        order = flat.argsort(stable=True)
        return flat[order], Basis(
            self.layer_collection, {lay: basis for lay, (_, basis) in parts.items()}, order, self.dtype
        )

    def sample(self, n: int, damping: Any = 0.0, generator: torch.Generator | None = None) -> PVector:
        """``n`` independent draws of ``N(0, (M + damping I)^-1)``, a batch of PVectors; ``generator``: torch's global
        one by default; ``damping``: what :meth:`solve` adds to the diagonal.
        """
        parts = {lay: (b, require_added(d, "sample")) for lay, (b, d) in damped(self, damping).items()}
        noise = PVector.randn(
            self.layer_collection,
            n,
            generator=generator,
            dtype=self.dtype,
            device=self.device if generator is None else generator.device,
        )
        draws = self._each(noise.flat().to(self.device), lambda part, y: part[0].root_times(y, part[1]), parts)
        return PVector(self.layer_collection, draws)

    # -- algebra -------------------------------------------------------------------------------------------------------

    def _dense(self) -> Tensor:
        if len(self.blocks) == 1:
            ((layout, block),) = self.blocks.items()
            if layout.is_span and len(layout.pieces) == 1:
                return block.dense()
        return super()._dense()

    def scaled(self, c: float | Tensor) -> Self:
        return self.of_blocks(
            self.layer_collection, {lay: b.scaled(c) for lay, b in self.blocks.items()}, self.examples
        )

    def added(self, other: ParameterOperator) -> Self | None:
        if not isinstance(other, PMat) or self.blocks.keys() != other.blocks.keys():
            return None
        sums = {lay: b.added(other.blocks[lay]) for lay, b in self.blocks.items()}
        if any(b is None for b in sums.values()):
            return None
        return self.of_blocks(self.layer_collection, sums, self.examples + other.examples)  # type: ignore[arg-type]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Another dtype or device, as ``Tensor.to``."""
        return self.of_blocks(
            self.layer_collection, {lay: b.to(*args, **kwargs) for lay, b in self.blocks.items()}, self.examples
        )

    def detach(self) -> Self:
        """Without its graph, which a matrix has that was made with a damping or a factor that requires a gradient."""
        blocks = {lay: b.detach() for lay, b in self.blocks.items()}
        return self.of_blocks(self.layer_collection, blocks, self.examples)

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for b in self.blocks.values() for t in b.tensors())

    def __reduce__(self) -> Any:
        blocks = {lay: b.detach() for lay, b in self.blocks.items()}
        return rebuilt, (type(self), self.layer_collection, blocks, self.examples)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, blocks={len(self.blocks)}, examples={self.examples}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )


def rebuilt(cls: type[PMat], collection: LayerCollection, blocks: dict[Layout, Block], examples: int) -> PMat:
    """What a pickle holds, as a matrix again."""
    return cls.of_blocks(collection, blocks, examples)

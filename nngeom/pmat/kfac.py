"""Kronecker products: one factor of inputs, one of output gradients, a block (Martens & Grosse 2015)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.given_plainly import require_real
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.counted import counted, divided
from nngeom.pmat.dropped import Dropped, Probes, all_dropped, probes_of, shares, sketched
from nngeom.pmat.factors import Shape, factor_shapes, factors, is_kronecker, structure_of
from nngeom.pmat.given import require_count
from nngeom.pmat.given_factors import blocks_of, factors_of
from nngeom.pmat.in_groups import factors_in_groups
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.kronecker_spectrum import KroneckerSpectrumBlock
from nngeom.pmat.long_factors import FACTOR_LIMIT, FORMS, Cut, Form, long_sides
from nngeom.pmat.nearest import Fitting, nearest, require_fit
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, Statistic
from nngeom.pmat.sua import has_window, sua_blocks, sua_shapes, sua_sums
from nngeom.space.collection import LayerCollection
from nngeom.space.joined import require_collection
from nngeom.sweep.sweep import Chunk


def factor_statistic(sharing: str, block_limit: int, cut: Cut = Cut(), *, sua: bool = False) -> Statistic:
    """``chunk -> {layout: {"a", "g"}}``: Kronecker factors, of inputs and of gradients; of those that are ``cut``,
    products with probes too.
    """
    if sharing not in ("expand", "reduce"):
        raise ArgumentError(f"sharing is {sharing!r}; expected 'expand' or 'reduce'")
    require_real(block_limit, "block_limit")
    probes = Probes(cut)

    def statistic(chunk: Chunk) -> Named:
        named: dict[Layout, Any] = {}
        for layout, j in chunk.jacobians.items():
            if j.shape[-1] > block_limit:
                require_room(j, layout.names, block_limit)
            if sua and has_window(layout, j):
                sums: Named = {layout: sua_sums(layout, j, sharing, cut.limit)}
            else:
                sums = _sums(layout, j, sharing, probes)
            named |= {part: counted(j, t, sharing) for part, t in sums.items()}  # type: ignore[arg-type]
        return named

    return statistic


def _sums(layout: Layout, j: LayerJacobian, sharing: str, probes: Probes) -> Named:
    """:func:`factors`, those that are too long cut."""
    cut = probes.cut
    if not long_sides(j, cut.limit):
        return {layout: factors(j, sharing, cut.limit)}
    parts = cut.parts(layout, j)
    if parts == (layout,):
        return {layout: factors(j, sharing, cut.limit) | probes_of(j, sharing, probes)}
    named = {part: factors_in_groups(layout, part, j, sharing, cut.limit) for part in parts}  # type: ignore[arg-type]
    named[parts[0]] |= probes_of(j, sharing, probes)
    for q, part in enumerate(parts[1:]):
        named[parts[0]][f"rest{q}"] = named[part]["a"]
    return named


def has_room(j: LayerJacobian, block_limit: int | None) -> bool:
    """Whether rows have factors, or an exact block that is not above the limit, if there is one."""
    if block_limit is not None:
        require_real(block_limit, "block_limit")
    return block_limit is None or j.shape[-1] <= block_limit or is_kronecker(structure_of(j))


def require_room(j: LayerJacobian, names: tuple[str, ...], block_limit: int) -> None:
    """Raise :class:`StructureError` for a parameter without Kronecker structure whose exact block is above the
    limit.
    """
    i = j.shape[-1]
    if not has_room(j, block_limit):
        raise StructureError(
            f"parameter {' and '.join(map(repr, names))} has no Kronecker structure and {i} entries; its exact "
            f"block of {i}**2 numbers is above "
            f"block_limit={block_limit}: raise block_limit, leave it out with LayerCollection.from_model(model, "
            "exclude=...), or give it "
            f"another representation, PMatMixed({{{names[0]!r}: PMatDiag}}, default=PMatKFAC)"
        )


def kronecker_block(means: dict[str, Tensor], groups: int = 1) -> KroneckerBlock:
    """From the means of :func:`factor_statistic`: a missing gradient factor is trivial, unlike uses are joined.

    ``groups`` of outputs and inputs: there are less factors of either than of both.
    """
    lost, means = shares(means), sketched(means)
    if "a0" in means:
        uses = sum(name.startswith("a") for name in means)
        return replace(KroneckerBlock.of(*(means[f"{side}{q}"] for q in range(uses) for side in "ag")), dropped=lost)
    a = means["a"]
    g = means["g"] if "g" in means else a.new_ones(a.shape[0], 1, 1)
    mine, theirs = a.shape[0], g.shape[0]
    if mine < groups or theirs < groups:
        a, g = a.repeat(groups // mine, *[1] * (a.ndim - 1)), g.repeat_interleave(groups // theirs, 0)
    return KroneckerBlock(a, g, (), lost)


def kronecker_blocks(means: dict[Layout, dict[str, Tensor]]) -> dict[Layout, KroneckerBlock]:
    """Every block; a layer whose places are taken to be uncorrelated has one for its weight and one for its bias."""
    blocks: dict[Layout, KroneckerBlock] = {}
    for layout, t in ((layout, divided(t)) for layout, t in means.items()):
        blocks |= sua_blocks(layout, t) if "c" in t else {layout: kronecker_block(t, layout.sizes[0])}
    return blocks


def block_shapes(layout: Layout, rows: LayerJacobian | None, cut: Cut, *, sua: bool) -> list[tuple[Shape, ...]]:
    """The shapes of the factors that each block for these rows holds; of unlike uses those of every use, after the
    joined ones.
    """
    if rows is None:
        return []
    if sua and has_window(layout, rows):
        return list(sua_shapes(layout, rows, cut.limit))
    parts = cut.parts(layout, rows)
    if parts != (layout,):
        return [((s, i, i), (s, o, o)) for s, o, i in (part.sizes for part in parts)]
    uses = factor_shapes(rows, cut.limit)
    if len(uses) < 2:
        return list(uses)
    joined = (max((pair[side] for pair in uses), key=len) for side in (0, 1))
    return [(*joined, *(shape for pair in uses for shape in pair))]


class PMatKFAC(PMat):
    """A Kronecker product a layer. ``sharing``: positions as independent (``"expand"``) or averaged first
    (``"reduce"``).

    ``sua``: the places of a window as uncorrelated, one factor of channels for all of them; the bias then is a block of
    its own. ``block_limit``: a parameter without Kronecker structure keeps its exact dense block up to so many entries,
    and above raises :class:`StructureError`. ``fit``: the second moments of inputs and of gradients (``"moments"``), or
    from these on the Kronecker product nearest to the exact block in Frobenius norm (``"nearest"``), in at most
    ``fit_steps`` more sweeps. Of a factor with a side above ``factor_limit`` the diagonal is kept, or (``factor_form=
    "block"``) diagonal blocks of equal sides up to that, or (``"low_rank"``, or ``("low_rank",
    rank)``) leading eigenvectors, by default as many as take the memory of a dense factor of that side, and a diagonal
    in place of the others; :attr:`dropped` says what is lost.
    """

    any_columns = True
    layerwise = True
    blocks_in_layers = True
    centred = False

    @classmethod
    def recipe(
        cls,
        selection: Selection,
        *,
        sharing: str = "expand",
        sua: bool = False,
        block_limit: int = 4096,
        fit: str = "moments",
        fit_steps: int = 50,
        factor_limit: int = FACTOR_LIMIT,
        factor_form: Form = "diagonal",
    ) -> Recipe:
        """Factors of the parameters of ``selection``; ``sharing``, ``sua``, ``block_limit``, ``fit``, ``fit_steps``,
        ``factor_limit``, ``factor_form``: see the class.
        """
        require_fit(fit, fit_steps, sua=sua or factor_form != "diagonal")
        cut = Cut.of(factor_limit, factor_form)
        blocks = kronecker_blocks((yield factor_statistic(sharing, block_limit, cut, sua=sua)))
        if fit == "nearest":
            return (yield from nearest(blocks, fit_steps))
        return {layout: KroneckerSpectrumBlock.of(block) for layout, block in blocks.items()}

    @classmethod
    def passes_with(cls, **options: Any) -> int:
        return cls.passes + (options.get("fit") == "nearest")

    @classmethod
    def in_basis_with(cls, matrix: PMat, **options: Any) -> Fitting:
        """The nearest Kronecker products of other rows, begun at those of ``matrix``, with its ``options``."""
        return Fitting(cls, {}, dict(matrix.blocks), options.get("fit_steps", 50))

    @classmethod
    def takes(cls, rows: LayerJacobian, **options: Any) -> bool:
        return has_room(rows, options.get("block_limit"))

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        cut = Cut.of(options["factor_limit"], options["factor_form"])
        shapes = block_shapes(layout, rows, cut, sua=options["sua"])
        held = None if rows is None or len(shapes) != 1 else cut.held(rows, shapes[0][:2])
        return 1 if rows is None else held or sum(math.prod(x) for pair in shapes for x in pair) or None

    @classmethod
    def notes_of(cls, layout: Layout, rows: LayerJacobian | None, **options: Any) -> tuple[str, ...]:
        return Cut(options.get("factor_limit", FACTOR_LIMIT), options.get("factor_form", FORMS[0])).notes(layout, rows)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """What of factors above ``factor_limit`` is not kept, one entry a factor, with its share of the Frobenius norm
        and a standard error.
        """
        return tuple(all_dropped(self.blocks))

    def __repr__(self) -> str:
        return "; kept ".join([super().__repr__(), *map(str, self.dropped)])

    @classmethod
    def from_factors(cls, lc: LayerCollection, factors: Mapping[Any, tuple[Tensor, Tensor]], examples: int = 1) -> Self:
        """The Kronecker products of ``factors``, ``{layer: (A, G)}``, of all layers of ``lc``; copies.

        ``A (i, i)`` is over the inputs, ``(i + 1, i + 1)`` with the bias last, ``G (o, o)`` over the outputs: entry
        ``[o, i], [p, j]`` of the block is ``G[o, p] A[i, j]``. A factor may be its diagonal, ``(i,)``; factors of a
        layer with groups have these as a leading axis, ``(s, i, i)`` and ``(s, o, o)``. A weight is output-major where
        the sizes allow it, else input-major; with a diagonal ``A`` the other way round, as a table. In place of a layer
        stand a parameter or a tuple (weight, bias) where it has several blocks.

        ``examples``: how many they are means over, for :func:`nngeom.merge`. Raises :class:`CollectionError` for a
        missing or foreign layer, :class:`ArgumentError` for another shape or an asymmetric factor.
        """
        return cls.of_blocks(lc, dict(blocks_of(require_collection(lc), factors)), require_count(examples))

    def factors(self) -> dict[Any, tuple[Tensor, Tensor]]:
        """``{layer: (A, G)}``, copies, as :meth:`from_factors` takes them: of these it makes this matrix again.

        A parameter without Kronecker structure has its exact block as ``A``, and ``G`` is ``1``. Raises
        :class:`StructureError` for a block whose place in the parameters the sizes of its factors do not tell: of an
        einsum, of a window with ``sua=True``, of a square table or transposed kernel with a dense ``A``.
        """
        return factors_of(self.layer_collection, self.blocks)

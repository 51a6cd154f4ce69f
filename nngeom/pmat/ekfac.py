"""Eigenvalue-corrected Kronecker factorisation: KFAC's eigenbasis with the exact second moments in it (George et al.
2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from nngeom.core.errors import DeviceError, StructureError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block
from nngeom.pmat.dropped import Dropped, all_dropped
from nngeom.pmat.eigenbases import eigenbases
from nngeom.pmat.in_groups import parts_among, squares_in_groups
from nngeom.pmat.kfac import block_shapes, factor_statistic, has_room, kronecker_blocks
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.long_factors import FACTOR_LIMIT, FORMS, Cut, Form, spectrum_entries
from nngeom.pmat.nearest import nearest, require_fit
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.pmat.sua import has_window, parts, sua_squares
from nngeom.sweep.sweep import Chunk


def scaling_statistic(bases: dict[Layout, EigenBlock]) -> Statistic:
    """``chunk -> {layout: {"d"}}``: squares of the rows in the kept eigenbases."""
    parted = {name: layout for layout in bases for name in layout.names}

    def statistic(chunk: Chunk) -> Named:
        named = {}
        for layout, j in chunk.jacobians.items():
            if layout in bases:
                named[layout] = {"d": j.rotate(bases[layout].ua, bases[layout].ug).square()}
            elif has_window(layout, j) and parts(layout)[0] in bases:
                named |= sua_squares(layout, j, bases)
            elif among := parts_among(layout, j, dict.fromkeys(parted[n] for n in layout.names if n in parted)):
                for part in among:
                    b = bases[part]
                    named[part] = {"d": squares_in_groups(layout, part, j, b.ua, b.ug)}  # type: ignore[arg-type]
            else:
                raise StructureError(
                    f"parameters {list(layout.names)[:4]} have no eigenbasis of this structure: they are used "
                    "differently here than in the data "
                    "the basis came from; measure a new PMatEKFAC"
                )
        return named

    return statistic


class PMatEKFAC(PMat, made_of=EigenBlock):
    """KFAC's eigenvectors, and the mean squares of the rows along them: never farther from the exact block than KFAC.

    Options ``sharing``, ``sua``, ``block_limit``, ``fit``, ``fit_steps``, ``factor_limit`` and ``factor_form`` as for
    :class:`PMatKFAC`.
    """

    passes = 2
    centred = False
    projects = True
    any_columns = True
    layerwise = True
    blocks_in_layers = True

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
        """Factors of the parameters of ``selection`` and their eigenvectors, then mean squares; ``sharing``, ``sua``,
        ``block_limit``, ``fit``, ``fit_steps``, ``factor_limit``, ``factor_form``: see the class.
        """
        require_fit(fit, fit_steps, sua=sua or factor_form != "diagonal")
        cut = Cut.of(factor_limit, factor_form)
        blocks = kronecker_blocks((yield factor_statistic(sharing, block_limit, cut, sua=sua)))
        if fit == "nearest":
            blocks = yield from nearest(blocks, fit_steps)
        return (yield from rescale(eigenbases(blocks, selection.team)))

    @classmethod
    def takes(cls, rows: LayerJacobian, **options: Any) -> bool:
        return has_room(rows, options.get("block_limit"))

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        # eigenvectors, eigenvalues of both factors, and the spectrum
        cut = Cut.of(options["factor_limit"], options["factor_form"])
        pairs = [pair[:2] for pair in block_shapes(layout, rows, cut, sua=options["sua"])]
        held = None if rows is None or len(pairs) != 1 else cut.held(rows, pairs[0])
        kept = held or sum(spectrum_entries(shape) for pair in pairs for shape in pair)
        return 1 if rows is None else kept + layout.numel if pairs else None

    @classmethod
    def notes_of(cls, layout: Layout, rows: LayerJacobian | None, **options: Any) -> tuple[str, ...]:
        return Cut(options.get("factor_limit", FACTOR_LIMIT), options.get("factor_form", FORMS[0])).notes(layout, rows)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """What of factors above ``factor_limit`` is not kept, as for :class:`PMatKFAC`."""
        return tuple(all_dropped(self.blocks))

    def __repr__(self) -> str:
        return "; kept ".join([super().__repr__(), *map(str, self.dropped)])

    @classmethod
    def in_basis(cls, matrix: PMat) -> Rescaling:
        return Rescaling(cls, {}, matrix.blocks)

    def rescaled(self, model: Any, loader: Any, measure: Callable[..., Any] | None = None, **options: Any) -> PMatEKFAC:
        """New eigenvalues in the kept eigenbasis: the mean squares of the rows of ``model`` now, in one sweep, as a new
        PMatEKFAC.

        ``measure``: :func:`FIM` (the default), :func:`GGN`, ..., or :func:`Hessian`, whose diagonal in the basis it is;
        ``options`` are its own (``likelihood=``, ``loss=``, ``samples=``, ...). The eigenvalues of the factors, which
        :class:`FactoredTikhonov` adds, stay those of the basis. Raises :class:`StructureError` where the model uses its
        parameters differently than when the basis was made, and what the measure raises. Source: George et al. 2018,
        algorithm 1.
        """
        return cast(PMatEKFAC, measured_again(self, self.in_basis(self), (model, loader), measure, options))


def measured_again(
    matrix: PMat,
    chosen: Representation[Any],
    data: tuple[Any, Any],
    measure: Callable[..., Any] | None,
    options: dict[str, Any],
) -> PMat:
    """The ``chosen`` representation of what ``matrix`` is over, measured with its ``options`` on ``data``, a model and
    a loader; by :func:`FIM` unless another ``measure`` is given.
    """
    from nngeom.measures.second_moments import FIM

    again: PMat = (measure or FIM)(*data, chosen, layer_collection=matrix.layer_collection, **options)
    return again


@dataclass(frozen=True, eq=False)
class Rescaling(Representation["PMatEKFAC"]):
    """EKFAC with its bases given: one sweep."""

    bases: dict[Layout, Block] = field(default_factory=dict)

    def recipe(self, selection: Selection) -> Recipe:
        """The recipe for the whole collection."""
        return (yield from rescale(self.bases_of(selection)))

    def bases_of(self, selection: Selection) -> dict[Layout, EigenBlock]:
        """Those of the parameters of the ``selection``."""
        mine, blocks = set(selection.names), self.bases.items()
        return {lay: b for lay, b in blocks if isinstance(b, EigenBlock) and mine.issuperset(lay.names)}

    @property
    def passes(self) -> int:
        return 1

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def centred(self) -> bool:
        return True


def rescale(bases: dict[Layout, EigenBlock]) -> Recipe:
    """The mean squares of the rows in given bases; zero for parameters that the data does not use."""

    def statistic(chunk: Chunk) -> Named:
        if not chunk.jacobians or not bases:
            return scaling_statistic(bases)(chunk)
        device, here, first = next(iter(chunk.jacobians.values())).device, bases, next(iter(bases.values()))
        if first.d.device != device:
            raise DeviceError(
                f"the eigenbasis is on {first.d.device} and the model on {device}; move one with .to(device)"
            )
        dtypes = {j.dtype for j in chunk.jacobians.values()}
        wide = functools.reduce(torch.promote_types, dtypes)
        if len(dtypes) > 1:
            chunk = replace(chunk, jacobians={layout: j.to(wide) for layout, j in chunk.jacobians.items()})
        if first.d.dtype != wide:
            here = {layout: b.to(wide) for layout, b in bases.items()}
        return scaling_statistic(here)(chunk)

    means = yield statistic
    return {
        layout: _with_spectrum(b, means[layout]["d"] if layout in means else torch.zeros_like(b.d))
        for layout, b in bases.items()
    }


def _with_spectrum(basis: EigenBlock, d: Tensor) -> EigenBlock:
    return EigenBlock(basis.ua, basis.ug, d.to(basis.d.dtype), basis.sa, basis.sg, basis.dropped)

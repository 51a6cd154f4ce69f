"""Different representations for different parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from nngeom.core.errors import ArgumentError, ArgumentTypeError, StructureError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock, PMatDiag
from nngeom.pmat.ekfac import PMatEKFAC, Rescaling, measured_again
from nngeom.pmat.eye import PMatEye
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, run_together
from nngeom.pmat.representation import Representation, as_representation
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True, eq=False)
class Mixture(Representation["PMatMixed"]):
    """Patterns of parameter or layer names to representations; the first that matches counts."""

    parts: tuple[tuple[Any, Representation[Any]], ...] = ()  # a pattern, or the set of names that one means
    default: Representation[Any] | None = None

    def recipe(self, selection: Selection) -> Recipe:
        groups: dict[int, list[str]] = {}
        for name in selection.names:
            groups.setdefault(self.part_of(name), []).append(name)
        unused = [p for j, (p, _) in enumerate(self.parts) if j not in groups and not self._matches_any(p, selection)]
        if unused:
            raise ArgumentError(
                f"patterns {unused} of PMatMixed match no parameter; the parameters are {list(selection.names)[:8]}"
            )
        recipes = []
        for index, names in groups.items():
            part = replace(selection, names=tuple(names))
            recipes.append((part, self.member(index).recipe(part)))
        return (yield from run_together(recipes))

    def entries_of(self, layout: Layout, rows: LayerJacobian | None, selection: Selection) -> int | None:
        index = self.part_of(layout.names[0])
        part = tuple(name for name in selection.names if self.part_of(name) == index)
        if not set(layout.names) <= set(part):
            return None  # measured, it is several blocks
        return self.member(index).entries_of(layout, rows, Selection(selection.collection, part))

    def within(self, collection: LayerCollection) -> Mixture:
        def names(pattern: Any) -> str | frozenset[str]:
            named = isinstance(pattern, (str, frozenset))
            return pattern if named else frozenset(collection.subset(pattern, "PMatMixed").names)

        rest = None if self.default is None else self.default.within(collection)
        return replace(self, parts=tuple((names(p), r.within(collection)) for p, r in self.parts), default=rest)

    def among(self, collection: LayerCollection) -> Mixture:
        used = [p for p in self.parts if any(_matches(name, p[0]) for name in collection.names)]
        return replace(self, parts=tuple(used))

    def last_sweep(self, matrix: PMat) -> Mixture:
        rest = None if self.default is None else self.default.last_sweep(matrix)
        return replace(self, parts=tuple((p, r.last_sweep(matrix)) for p, r in self.parts), default=rest)

    @property
    def passes(self) -> int:
        return max(r.passes for r in self.members)

    @property
    def centred(self) -> bool:
        return all(r.centred for r in self.members)

    @property
    def any_columns(self) -> bool:
        return all(r.any_columns for r in self.members)

    @property
    def projects(self) -> bool:
        return all(r.projects for r in self.members)

    @property
    def layerwise(self) -> bool:
        return all(r.layerwise for r in self.members)

    @property
    def members(self) -> tuple[Representation[Any], ...]:
        """All that are mixed."""
        return (*(r for _, r in self.parts), *((self.default,) if self.default is not None else ()))

    def part_of(self, name: str) -> int:
        for j, (pattern, _) in enumerate(self.parts):
            if _matches(name, pattern):
                return j
        if self.default is None:
            raise ArgumentError(
                f"no pattern of PMatMixed matches parameter {name!r} and there is no default; pass "
                "default=PMatDiag, say"
            )
        return -1

    def _matches_any(self, pattern: Any, selection: Selection) -> bool:
        return any(_matches(n, pattern) for n in selection.names)

    def member(self, part: int) -> Representation[Any]:
        chosen = self.default if part < 0 else self.parts[part][1]
        if chosen is None:
            raise ArgumentError("PMatMixed has no default representation; pass default=")
        return chosen


def _matches(name: str, pattern: Any) -> bool:
    if isinstance(pattern, frozenset):
        return name in pattern
    if not isinstance(pattern, str):
        raise ArgumentTypeError(f"pattern {pattern!r} of PMatMixed needs a model; expected a name or glob here")
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


class PMatMixed(PMat, made_of=Block):
    """``PMatMixed({pattern: representation, ...}, default=...)`` is a representation; measured with it, a matrix.

    ``parts`` are patterns with what holds the parameters that match, the first counts; ``default`` holds the others.
    Patterns are those of :meth:`LayerCollection.from_model`: names, globs, modules, classes of modules, predicates,
    tuples of these; representations may carry options, ``PMatKFAC.options(...)``.
    """

    def __new__(cls, parts: Mapping[Any, Any] | None = None, default: Any = None) -> Mixture:  # type: ignore[misc]
        if not isinstance(parts, Mapping):
            raise ArgumentTypeError(f"PMatMixed takes a dict {{pattern: representation}}, got {type(parts).__name__}")
        listed = tuple((pattern, as_representation(r)) for pattern, r in parts.items())
        return Mixture(cls, {}, listed, None if default is None else as_representation(default))

    def rescaled(self, model: Any, loader: Any, measure: Callable[..., Any] | None = None, **options: Any) -> PMatMixed:
        """New eigenvalues in the kept eigenbases, as a new PMatMixed: the mean squares of the rows of ``model`` now, in
        one sweep over ``loader``.

        Of parts in a Kronecker eigenbasis, of Kronecker products too, which then have any spectrum in theirs; a
        diagonal is one in the basis of the parameters. ``measure`` and its ``options`` as for
        :meth:`PMatEKFAC.rescaled`. Raises :class:`StructureError` where another kind of block keeps no eigenbasis.
        """
        names: dict[type[PMat], list[str]] = {}
        bases: dict[Layout, Block] = {}
        for layout, block in self.blocks.items():
            kind = _rescaled_kind(layout, block)
            names.setdefault(kind, []).extend(layout.names)
            if kind is PMatEKFAC:
                bases[layout] = block if isinstance(block, EigenBlock) else block.eigen()  # type: ignore[attr-defined]
        parts = []
        for kind, some in names.items():
            part = Rescaling(PMatEKFAC, {}, bases) if kind is PMatEKFAC else as_representation(kind)
            parts.append((frozenset(some), part))
        chosen = Mixture(type(self), {}, tuple(parts))
        return cast(PMatMixed, measured_again(self, chosen, (model, loader), measure, options))

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        raise ArgumentError("PMatMixed needs to know what to mix: PMatMixed({pattern: representation}, default=...)")


def _rescaled_kind(layout: Layout, block: Block) -> type[PMat]:
    """What holds the new eigenvalues of a block."""
    if isinstance(block, (EigenBlock, KroneckerBlock)):
        return PMatEKFAC
    if isinstance(block, EyeBlock) and bool(block.c != 0):
        return PMatEye
    if isinstance(block, (DiagBlock, EyeBlock)):
        return PMatDiag
    raise StructureError(
        f"the block of {list(layout.names)[:4]} is a {type(block).__name__}, which keeps no eigenbasis to measure "
        "eigenvalues in; expected parts in PMatEKFAC, PMatKFAC, PMatDiag or PMatEye, or measure a new PMatMixed"
    )

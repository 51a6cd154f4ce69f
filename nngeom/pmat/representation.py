"""What is passed as ``representation``: a class of matrices that a recipe measures, and its options."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from typing_extensions import Self

from nngeom.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.registry import Registry
from nngeom.space.collection import LayerCollection

if TYPE_CHECKING:
    from nngeom.core.jacobian import LayerJacobian
    from nngeom.pmat.pmat import PMat
    from nngeom.pmat.recipe import Recipe, Selection

M_co = TypeVar("M_co", covariant=True)


@dataclass(frozen=True, eq=False)
class Representation(Generic[M_co]):
    """A representation with its options: what is passed as ``representation`` to have a matrix of the class ``M``."""

    kind: type[Measured]
    settings: dict[str, Any]

    def recipe(self, selection: Selection) -> Recipe:
        """The recipe for some of the parameters; raises :class:`ArgumentError` on unknown options."""
        known = [p.name for p in _options(self.kind)]
        odd = [name for name in self.settings if name not in known]
        if odd:
            raise ArgumentError(f"{self.kind.__name__} has no option {odd}; it has {known or 'none'}")
        return self.kind.recipe(selection, **self.settings)

    @property
    def passes(self) -> int:
        """How many sweeps the recipe takes."""
        return self.kind.passes_with(**self.settings)

    @property
    def centred(self) -> bool:
        """Whether rows whose mean was taken from them may enter."""
        return self.kind.centred

    @property
    def any_columns(self) -> bool:
        """See :attr:`Measured.any_columns`."""
        return self.kind.any_columns

    @property
    def projects(self) -> bool:
        """Whether it keeps something of any symmetric matrix."""
        return self.kind.projects or self.kind.entries is not None

    def entries_of(self, layout: Layout, rows: LayerJacobian | None, selection: Selection) -> int | None:
        """See :meth:`Measured.entries_of`; ``None`` too for a recipe that is not the one that was spoken of."""
        said = next(k for k in self.kind.__mro__ if not vars(k).keys().isdisjoint(("recipe", "entries_of")))
        if "entries_of" not in vars(said):
            return None
        return self.kind.entries_of(layout, rows, selection, **self._options())

    def notes_of(self, layout: Layout, rows: LayerJacobian | None) -> tuple[str, ...]:
        """See :meth:`Measured.notes_of`."""
        return self.kind.notes_of(layout, rows, **self._options())

    def takes(self, rows: LayerJacobian) -> bool:
        """See :meth:`Measured.takes`."""
        return self.kind.takes(rows, **self._options())

    def _options(self) -> dict[str, Any]:
        """All options of the recipe, with its defaults."""
        return {p.name: p.default for p in _options(self.kind) if p.default is not p.empty} | self.settings

    def last_sweep(self, matrix: PMat) -> Representation[Any]:
        """What the last sweep alone measures, with what the others gave taken from ``matrix``; itself where there is
        only one.
        """
        return self if self.passes == 1 else self.kind.in_basis_with(matrix, **self.settings)

    @property
    def blocks_in_layers(self) -> bool:
        """See :attr:`Measured.blocks_in_layers`."""
        return self.kind.blocks_in_layers

    @property
    def layerwise(self) -> bool:
        """See :attr:`Measured.layerwise`."""
        return self.kind.layerwise

    def among(self, collection: LayerCollection) -> Representation[M_co]:
        """For the parameters of a ``collection`` alone, a part of those it was :meth:`within`."""
        return self

    def within(self, collection: LayerCollection) -> Representation[M_co]:
        """With patterns that need the model of the ``collection`` turned into names."""
        return self

    def part_of(self, name: str) -> int:
        """The part of the parameter ``name``; parameters of different parts never share a block."""
        return 0

    @property
    def division(self) -> Callable[[str], int] | None:
        """:meth:`part_of`, or ``None`` where all parameters are of one part."""
        return None if type(self).part_of is Representation.part_of else self.part_of

    def member(self, part: int) -> Representation[Any]:
        """The representation of a ``part``."""
        return self


@functools.cache
def _options(kind: type[Measured]) -> tuple[inspect.Parameter, ...]:
    """What the recipe of a class takes beside the selection."""
    return tuple(inspect.signature(kind.recipe).parameters.values())[1:]


class Measured(ABC):
    """A class of matrices that are measured by a recipe: what it says of itself to those who measure."""

    passes: ClassVar[int] = 1
    centred: ClassVar[bool] = True  # any rows may enter, such as those less their mean, not only sums of outer products
    any_columns: ClassVar[bool] = False  # statistics are sums over cotangents in blocks: of any root of the metric
    entries: ClassVar[str | None] = None  # kept as they are of any matrix: "all", those in "layers", the "diagonal"
    blocks_in_layers: ClassVar[bool] = False  # none reaches over several
    projects: ClassVar[bool] = False  # what it keeps of any matrix is read off products with the vectors of its blocks
    layerwise: ClassVar[bool] = False  # what it keeps of a layer is the same where others are not measured
    kinds: ClassVar[Registry[Any]] = Registry()  # by qualified name, for files

    @classmethod
    @abstractmethod
    def recipe(cls, selection: Selection) -> Recipe:
        """How this representation of the parameters of ``selection`` is estimated from LayerJacobians."""

    @classmethod
    @abstractmethod
    def of_blocks(cls, collection: LayerCollection, blocks: dict[Layout, Any], examples: int) -> PMat:
        """The matrix of the ``blocks`` over a ``collection`` that a recipe returned, means over ``examples``."""

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        """How many numbers are kept for the block of the parameters of ``layout``; ``None`` where that is not known
        before measuring.

        ``rows``: those of a batch, of which the type and the sizes ``[k, n, s, o, i]`` count; ``None`` where the batch
        does not use the parameters. ``selection``: all parameters that are represented; ``options``: those of the
        recipe, by name.
        """
        return None

    @classmethod
    def notes_of(cls, layout: Layout, rows: LayerJacobian | None, **options: Any) -> tuple[str, ...]:
        """What a reader should know of the block of ``layout``, with these ``rows`` and ``options`` of the recipe."""
        return ()

    @classmethod
    def passes_with(cls, **options: Any) -> int:
        """How many sweeps the recipe takes with ``options``; of some that go on until they are done, more than one."""
        return cls.passes

    @classmethod
    def takes(cls, rows: LayerJacobian, **options: Any) -> bool:
        """Whether a block with these ``rows`` can be kept, with ``options`` of the recipe; an optimizer keeps the
        others in another way.
        """
        return True

    @classmethod
    def options(cls, **settings: Any) -> Representation[Self]:
        """This representation with options, its ``settings`` by name, for use inside :class:`PMatMixed`."""
        return Representation(cls, settings)

    @classmethod
    def in_basis(cls, matrix: PMat) -> Representation[Self]:
        """This representation in the kept basis of ``matrix``, measured in one sweep, where it has such a thing."""
        raise UnsupportedError(
            f"{cls.__name__} takes several sweeps and keeps no basis (it has no in_basis), so it is not estimated from "
            "random probes, nor measured of centred rows; use PMatEKFAC, or a representation of a single sweep"
        )

    @classmethod
    def in_basis_with(cls, matrix: PMat, **options: Any) -> Representation[Self]:
        """:meth:`in_basis` with the ``options`` that ``matrix`` was measured with."""
        return cls.in_basis(matrix)


def as_representation(r: Any, **settings: Any) -> Representation[Any]:
    """A representation from a PMat class or one with options."""
    if isinstance(r, Representation):
        if settings:
            raise ArgumentError(
                f"options {list(settings)} belong inside the representation: {r.kind.__name__}.options(...)"
            )
        return r
    if isinstance(r, type) and issubclass(r, Measured):
        return Representation(r, settings)
    raise ArgumentTypeError(
        f"representation is {r!r}; expected one of {sorted(Measured.kinds)}, or one with options, PMatKFAC.options(...)"
    )

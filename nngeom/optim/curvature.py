"""What an optimizer keeps of the curvature of some parameters: statistics in, preconditioned gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.optim.averages import Averages, are_finite, plain_blocks, restored_blocks
from nngeom.optim.manner import Manner
from nngeom.optim.packed import Packed
from nngeom.optim.pending import Seen
from nngeom.optim.rank import BatchRank
from nngeom.optim.schedule import Schedule
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.ranks.team import ALONE
from nngeom.sweep.sweep import Chunk


class Curvature(ABC):
    """What is kept of the curvature of one part of the parameters, and what it does to their gradient.

    Subclasses say :meth:`observe` and :meth:`precondition`, and register under :func:`keeps`. ``pending`` are sums
    since the last step (``pending.add(statistic, chunk)``), ``averages`` running means of them
    (``averages.take(pending, seen.examples, seen.scale, schedule.decay)``, ``averages.read()``), ``blocks`` what
    preconditions: nothing was observed where there are none. The last two are saved and loaded with the optimizer, and
    may be kept by another process alone, which is sent the sums: :attr:`known` then says whether it has blocks.

    Args:
        representation: the class of matrices, and its options.
        selection: the parameters.
        manner: what the optimizer's options say.
    """

    tells_variances: ClassVar[bool] = False  # of examples along eigenvectors, where it reads their rows

    def __init__(self, representation: Representation, selection: Selection, manner: Manner):
        self.representation, self.selection, self.manner = representation, selection, manner
        self.averages = Averages()
        self.blocks: dict[Layout, Any] = {}
        self.elsewhere = False  # another process keeps blocks of these parameters
        self._packed: Packed | None = None
        self.rank = BatchRank(on=manner.team.size == 1 and not manner.own_rows)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.pending = Sums()
        self.rank.forget()

    def finite(self) -> bool:
        """Whether what was observed is free of NaN and infinity."""
        return are_finite(self.pending)

    @property
    def wants_every_batch(self) -> bool:
        """Whether the rows of batches are taken in whose statistics are not due."""
        return False

    @property
    def wants_statistics(self) -> bool:
        """Whether those of batches are whose statistics are."""
        return True

    @property
    def mine(self) -> bool:
        """Whether this process keeps what there is."""
        return self.manner.owner in (None, self.manner.team.rank)

    @property
    def known(self) -> bool:
        """Whether there are blocks, here or with the process that keeps them."""
        return bool(self.blocks) or self.elsewhere

    def why_not_owned(self) -> str | None:
        """What stands against one process keeping this for all, by sums of the others', if something does."""
        return f"{self.representation.kind.__name__}, as {type(self).__name__} keeps it"

    def own(self, owner: int) -> None:
        """From now on the process ``owner`` keeps this for all."""
        self.manner = replace(self.manner, owner=owner)
        self.selection = replace(self.selection, team=ALONE)

    @abstractmethod
    def observe(self, chunk: Chunk, schedule: Schedule) -> None:
        """Take in the rows of some examples, ``chunk``, gradients as they were backpropagated, where the ``schedule``
        wants them.
        """

    @abstractmethod
    def precondition(self, gradient: Tensor, seen: Seen, schedule: Schedule) -> None:
        """Bring averages, inverses and bases up to date, and precondition these parameters' part of ``gradient [d]`` in
        place; ``seen``: what was observed since the last step; ``schedule``: what is due at it, and the damping.
        """

    def packed(self, vector: Tensor) -> Packed:
        """Room for the blocks of these parameters, filled from the ``vector``; ``write()`` brings it back."""
        if self._packed is None or self._packed.vector is not vector or self._packed.layouts != tuple(self.blocks):
            self._packed = Packed(self.blocks, vector)
        self._packed.read()
        return self._packed

    @property
    def kind(self) -> str:
        """What is kept, by name: a state of another cannot be taken over; spectra of one scale can."""
        of = "" if self.manner.factors == "rows" else f" of {self.manner.factors}"
        scale = "" if self.manner.scalings in SECOND_MOMENTS else f" with scalings={self.manner.scalings!r}"
        return f"{self.representation.kind.__name__}{of}{scale}"

    @property
    def shapes(self) -> list[list[int]]:
        """Those of the parameters."""
        table = self.selection.collection.offsets()
        return [list(table[name][1]) for name in self.selection.names]

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "names": list(self.selection.names),
            "averages": self.averages.plain(),
            "blocks": plain_blocks(self.blocks),
            "rank": self.rank.state(),
            "kind": self.kind,
            "shapes": self.shapes,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a ``state``, as :meth:`state` gave it."""
        self.averages, self.blocks = Averages.restored(state["averages"]), restored_blocks(state["blocks"])
        if "rank" in state:
            self.rank.load(state["rank"])


SECOND_MOMENTS = ("batch", "running", "factors")  # scalings that are those of examples
KEEPERS: dict[type[PMat], type[Curvature]] = {}
Kept = TypeVar("Kept", bound=Curvature)


def keeps(*kinds: type[PMat]) -> Callable[[type[Kept]], type[Kept]]:
    """A decorator: this :class:`Curvature` keeps matrices of these ``kinds``, and of their subclasses, in training."""

    def register(curvature: type[Kept]) -> type[Kept]:
        KEEPERS.update(dict.fromkeys(kinds, curvature))
        return curvature

    return register

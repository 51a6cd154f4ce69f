"""The examples along one axis of a kernel over several processes: how many each holds, in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core.errors import OutputError
from nngeom.ranks.data import warn_of_same
from nngeom.ranks.team import Team
from nngeom.sweep.sweep import require_examples

if TYPE_CHECKING:
    from nngeom.fmat.side import Side


@dataclass(frozen=True)
class Places:
    """``counts``: how many examples each process of the ``team`` has; ``outputs``: rows an example has on all."""

    team: Team
    counts: tuple[int, ...]
    outputs: int

    @staticmethod
    def of(side: Side) -> Places:
        """Of the sides that all processes hold; raises :class:`LoaderError` where none has an example, and
        :class:`OutputError` where these differ in their number of outputs.
        """
        run = side.run
        with run.team.together("examples") as note:
            note.mine = side.examples, side.outputs if side.sizes else None, run.met.get(0)
        warn_of_same([(digest, n) for n, _, digest in note.all])
        require_examples(sum(n for n, _, _ in note.all))
        outputs = sorted({c for _, c, _ in note.all if c is not None})
        if len(outputs) > 1:
            raise OutputError(
                f"examples have {outputs[0]} and {outputs[1]} outputs on different processes; expected the same number"
            )
        return Places(run.team, tuple(n for n, _, _ in note.all), outputs[0])

    @property
    def total(self) -> int:
        """The examples of all processes."""
        return sum(self.counts)

    @property
    def mine(self) -> slice:
        """Where those of this process lie among all."""
        return self.of_rank(self.team.rank)

    def of_rank(self, rank: int) -> slice:
        """Where those of a ``rank`` lie among all."""
        lo = sum(self.counts[:rank])
        return slice(lo, lo + self.counts[rank])

    def whole(self, strip: Tensor) -> Tensor:
        """All rows ``[c, total, ...]`` of the ``strip [c, n, ...]`` that each process holds, the same bits on all."""
        out = strip.new_empty(strip.shape[0], self.total, *strip.shape[2:])
        for rank, count in enumerate(self.counts):
            own = rank == self.team.rank
            part = strip.contiguous() if own else strip.new_empty(strip.shape[0], count, *strip.shape[2:])
            self.team.spread([part], rank)
            out[:, self.of_rank(rank)] = part
        return out

    def less_mean(self, strip: Tensor) -> Tensor:
        """The ``strip`` less the mean over the examples of all processes, in place."""
        total = strip.sum(1, keepdim=True)
        self.team.sum_([total])
        return strip.sub_(total / self.total)


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize

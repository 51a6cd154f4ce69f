"""The step of several processes on one joint batch: agreed on, its statistics scaled by each and summed over all.

``.grad`` is the mean over processes, as ``DistributedDataParallel`` makes it; rows are each process's own, with the
reduction of its own loss. So each scales its sums first, then they are added, then divided by the number of examples of
all.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, PeerError, RankMismatchError, UnevenBatchWarning, UnsupportedError
from nngeom.core.memory import DEFAULT_BUDGET
from nngeom.core.statistic import Sums
from nngeom.optim.partition import Partition
from nngeom.optim.pending import Pending, Seen
from nngeom.optim.schedule import Schedule
from nngeom.ranks.fingerprint import ranks_text
from nngeom.ranks.merged import Header, merged
from nngeom.ranks.team import Team
from nngeom.sweep.agreement import agree
from nngeom.sweep.observe import Observer
from nngeom.sweep.run import Run

UNEVEN = 0.01  # of the mean number of examples, above which batches are said to be uneven


@dataclass(frozen=True)
class JointSeen(Seen):
    """What all processes have seen; ``own`` scales the rows of this one, whose tensors lie on ``device``."""

    own: float
    team: Team
    device: torch.device

    def joined(self, sums: Sums) -> Sums:
        sums.scale_(self.own)
        with self.team.together("statistics") as note:
            note.mine = Header.of(sums)
        return merged(sums, self.team, note.all, self.device)


@dataclass(frozen=True)
class _Told:
    """What a process says of its part of a step."""

    why: tuple[str, str] | None  # it is not to be taken
    examples: int
    positions: int
    agreed: dict[str, str]
    batchwise: frozenset[str]
    rest: frozenset[str]
    parts: tuple[tuple[Any, tuple[str, ...]], ...]
    headers: tuple[Header, ...]

    @property
    def structure(self) -> Any:
        """What must be the same for statistics to be added up."""
        return self.batchwise, self.rest, self.parts


class Joint:
    """The processes that train together, seen from an optimizer."""

    def __init__(self, team: Team, observer: Observer, partition: Partition, pending: Pending) -> None:
        self.team, self.observer, self.partition, self.pending = team, observer, partition, pending

    def agree(self, what: str, **settings: Any) -> None:
        """Raise :class:`RankMismatchError` where models, their numbers or settings differ."""
        agree(Run(self.observer.network, (), DEFAULT_BUDGET, team=self.team), what, **settings)

    def mean(self, loss: float) -> float:
        """The mean of a number over processes: the loss whose gradient ``.grad`` is."""
        losses = self.team.exchange("loss", loss)
        return sum(losses) / len(losses)

    def seen(self, schedule: Schedule, why: tuple[str, str] | None) -> Seen | tuple[str, str]:
        """What was seen since the last step, with the statistics of all parts summed over processes; or why the step is
        to be left out, the same on all. ``why``: what this process has against it.
        """
        own_loss = self.observer.cotangents is None
        self.partition.decide()
        if self.team.size == 1:
            return self.pending.seen(own_loss=own_loss) if why is None else why
        told = self.team.exchange("step", self._told(schedule, why))
        self._require_agreed(told)
        for rank, other in enumerate(told):
            if other.why is not None:
                return other.why[0], f"on rank {rank} of {self.team.size}, {other.why[1]}"
        if any(other.structure != told[0].structure for other in told):
            return self._settle(told)
        seen = self._joint(told, own_loss=own_loss)
        for j, part in enumerate(self.partition):
            part.pending.scale_(seen.own)
            headers, owner = [other.headers[j] for other in told], part.manner.owner
            merged(part.pending, self.team, headers, seen.device, to=owner)
            if not part.mine:
                part.forget()
        return seen

    def precondition(self, gradient: Tensor, seen: Seen, schedule: Schedule) -> None:
        """Every part its own places of the ``gradient [d]``, in place; those that other processes keep are sent. All
        of them raise what one does.
        """
        if not self.partition.owners.apart:
            for part in self.partition:
                part.precondition(gradient, seen, schedule)
            return
        if getattr(schedule.damping, "top", None) is not None:
            raise UnsupportedError(
                f"damping is {schedule.damping!r}, of eigenvalues that several processes keep; use "
                "placement='replicated', or Cutoff(x)"
            )
        with self.team.together("preconditioning") as note:
            for part in self.partition:
                if part.mine:
                    part.precondition(gradient, seen, schedule)
            note.mine = [part.known for part in self.partition]
        sent: dict[int, list[Tensor]] = {rank: [] for rank in range(self.team.size)}
        for j, ((_, owner), part) in enumerate(self.partition.parts.items()):
            part.elsewhere = not part.mine and note.all[owner][j]
            sent[owner] += [gradient[piece.offset : piece.stop] for piece in part.selection.span().pieces]
        for rank, pieces in sent.items():
            self.team.spread(pieces, rank)

    def _told(self, schedule: Schedule, why: tuple[str, str] | None) -> _Told:
        return _Told(
            why=why,
            examples=self.pending.examples,
            positions=self.pending.positions,
            agreed={"schedule": repr(schedule), "reduction": self.pending.reduction},
            batchwise=frozenset(self.observer.batchwise),
            rest=frozenset(self.partition.rest_names),
            parts=tuple((key, part.selection.names) for key, part in self.partition.parts.items()),
            headers=tuple(Header.of(part.pending) for part in self.partition),
        )

    def _require_agreed(self, told: list[_Told]) -> None:
        self.team.require_same([other.agreed for other in told], "a step needs the same on all processes")
        empty = [rank for rank, other in enumerate(told) if not other.examples]
        if empty and len(empty) < len(told):
            raise RankMismatchError(
                f"{ranks_text(empty)} of {len(told)} observed no example since the last step, and others did; expected "
                "forward and backward passes on all processes"
            )

    def _settle(self, told: list[_Told]) -> tuple[str, str]:
        """Parameters that some process sees as no adapter knows them are so on all from now on."""
        self.observer.batchwise.update(*(other.batchwise for other in told))
        self.partition.leave(set[str]().union(*(other.rest for other in told)))
        return "structure", "processes used parameters differently; from now on these are kept alike on all"

    def _joint(self, told: list[_Told], *, own_loss: bool) -> JointSeen:
        counts = [other.examples for other in told]
        n, positions, mine = sum(counts), max(1, sum(other.positions for other in told)), self.pending
        even = max(counts) - min(counts) <= UNEVEN * n / len(counts)
        if not even and mine.reduction != "sum":
            warnings.warn(
                f"the processes saw {min(counts)} to {max(counts)} examples: the mean over processes is not that over "
                "examples; use batches of one size, or reduction='sum'",
                UnevenBatchWarning,
                stacklevel=5,
            )
        match mine.reduction:
            case "token_mean":
                metric, mean = (n / positions) ** 0.5, (positions / max(n, 1)) ** 0.5
                own = max(mine.positions, 1) * metric
            case "mean":
                own, metric, mean = float(mine.examples), 1.0, 1.0
            case _:
                own, metric, mean = 1.0, 1.0, len(counts) / max(n, 1)
        scale = own / mine.loss_scale if own_loss else metric
        return JointSeen(n, 1.0, mean, scale, self.team, self.observer.network.device)


def is_curvature(error: Exception) -> bool:
    """Whether a step that raised ``error`` is left out: a matrix that is singular or not finite, here or elsewhere."""
    return not isinstance(error, PeerError) or error.kind in ("SingularError", "NonFiniteError")


def require_synchronous(team: Team, *, async_basis: bool) -> None:
    """Raise :class:`ArgumentError` for what runs beside the steps of several processes."""
    if team.size > 1 and async_basis:
        raise ArgumentError(
            "async_basis=True with process_group: a basis would be ready at other steps on other processes; leave it "
            "out"
        )

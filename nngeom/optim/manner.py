"""What an optimizer's options say of how curvature is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real
from nngeom.ranks.team import ALONE, Team


@dataclass(frozen=True)
class Manner:
    """What the optimizer's options say of how curvature is kept.

    Args:
        eager: inverses follow every new statistic, whatever the schedule.
        scalings: the spectrum in eigenbases, by name.
        own_rows: the rows are those of a likelihood, not of the user's loss.
        team: the processes that share a step.
        owner: the one of them that keeps this part for all; ``None``: all keep it.
        worker: a background thread, where one may be used.
        factors: whose eigenbases, those of ``"rows"`` or of ``"gradients"``.
        refresh: how later eigenbases come about, ``"eigh"`` or ``"qr"``.
        power: of the damped spectrum, by which gradients are divided.
        first_decay: the weight of the past in Adam's first moment in the eigenbasis.
        drowned: of what damping adds to a factor, up to which its eigenvalues count as their mean.
    """

    eager: bool = False
    scalings: str = "batch"
    own_rows: bool = False
    team: Team = ALONE
    owner: int | None = None
    worker: ThreadPoolExecutor | None = None
    factors: str = "rows"
    refresh: str = "eigh"
    power: float = 1.0
    first_decay: float = 0.95
    drowned: float = 0.0

    @property
    def makers(self) -> Team:
        """The processes that share the making of inverses and bases of this part."""
        return self.team if self.owner is None else ALONE


def as_manner(**options: Any) -> Manner:
    """A checked manner; raises :class:`ArgumentError`."""
    manner = Manner(**options)
    for name, known in (("factors", ("rows", "gradients")), ("refresh", ("eigh", "qr"))):
        if getattr(manner, name) not in known:
            raise ArgumentError(f"{name} is {getattr(manner, name)!r}; expected {known[0]!r} or {known[1]!r}")
    if isinstance(manner.power, bool) or not isinstance(manner.power, (int, float)) or not 0 < manner.power <= 1:
        raise ArgumentError(
            f"power is {manner.power!r}; expected a number in (0, 1]: 1 divides by the spectrum, 1/2 by its root"
        )
    require_real(manner.first_decay, "first_decay")
    require_real(manner.drowned, "drowned")
    if not 0 <= manner.first_decay < 1:
        raise ArgumentError(f"first_decay is {manner.first_decay}; expected a number in [0, 1)")
    if manner.drowned < 0:
        raise ArgumentError(f"drowned is {manner.drowned}; expected a number of at least 0, a part of the damping")
    if manner.factors == "gradients" and (manner.own_rows or manner.scalings == "batch"):
        raise ArgumentError(
            "factors='gradients' are of the gradient of the batch, not of rows; expected fisher='empirical' and "
            "scalings='running', 'adam' or 'factors', or factors='rows'"
        )
    return manner

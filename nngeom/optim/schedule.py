"""What is due at a step, and the numbers in force at it."""

from __future__ import annotations

from types import NoneType
from typing import Any, NamedTuple

from nngeom.core.damping import Damping, Relative
from nngeom.core.errors import ArgumentError
from nngeom.optim.arguments import as_optimizer_damping, number
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.optim.variance_damping import VarianceDamping


class Schedule(NamedTuple):
    """What is due at one step.

    Args:
        statistics: whether averages take in this batch.
        refresh: whether inverses or eigenbases are computed anew.
        decay: the weight of the past in the averages.
        scalings_decay: the same for spectra that follow every step.
        damping: the damping in force.
        kl_clip: the bound on the divergence of the step, or none.
        variance: the rule by which noise shortens steps, or none.
    """

    statistics: bool
    refresh: bool
    decay: float
    scalings_decay: float
    damping: Damping | Relative
    kl_clip: float | None
    variance: VarianceDamping | None = None


class Clock:
    """Counts steps, and knows what is due: numbers, or callables of the step, as they were given to the constructor."""

    def __init__(self, damping: Any, *, variances: bool = False, **numbers: Any):
        """``variances``: whether those of the examples along eigenvectors are known. Raises :class:`ArgumentError` for
        a number out of range.
        """
        self.damping, self.variances, self.numbers = damping, variances, numbers
        self.steps, self.refreshed = 0, -1
        self._checked: tuple[Any, Damping | Relative] | None = None  # a damping as given, and what it stands for
        self._vary = not all(isinstance(x, (int, float, NoneType)) for x in numbers.values())
        for name, x in numbers.items():
            number(name, x, 0)

    def due(self) -> bool:
        """Whether statistics are due at the coming step."""
        return self._due(self._numbers("every", "statistics_decay", "statistics_every"))[0]

    def now(self) -> Schedule:
        """The schedule of the coming step; raises :class:`ArgumentError` for a number out of range."""
        now = self._numbers(*self.numbers)
        statistics, refresh = self._due(now)
        return Schedule(
            statistics=statistics,
            refresh=refresh,
            decay=now["statistics_decay"],
            scalings_decay=now["scalings_decay"],
            damping=self._damping(),
            kl_clip=now["kl_clip"],
            variance=self.damping if isinstance(self.damping, VarianceDamping) else None,
        )

    def _numbers(self, *names: str) -> dict[str, Any]:
        """Those of the coming step; such as do not vary were checked."""
        return {name: number(name, self.numbers[name], self.steps) for name in names} if self._vary else self.numbers

    def _due(self, now: dict[str, Any]) -> tuple[bool, bool]:
        """Statistics, and a refresh."""
        refresh = self.refreshed < 0 or self.steps - self.refreshed >= now["every"]
        return refresh or (now["statistics_decay"] > 0 and self.steps % int(now["statistics_every"]) == 0), refresh

    def _damping(self) -> Damping | Relative:
        if isinstance(self.damping, LevenbergMarquardt):
            return self.damping.damping()
        if isinstance(self.damping, VarianceDamping):
            if not self.variances:
                raise ArgumentError(
                    "VarianceDamping compares the gradients of the examples along eigenvectors: expected "
                    "nng.optim.EKFAC(model, scalings='batch') with fisher='empirical'"
                )
            return self.damping.damping()
        given = self.damping(self.steps) if callable(self.damping) else self.damping
        if self._checked is None or self._checked[0] is not given:
            self._checked = given, as_optimizer_damping(given)
        return self._checked[1]

    def tick(self, schedule: Schedule) -> None:
        """A step was taken."""
        if schedule.refresh:
            self.refreshed = self.steps
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What decides the steps to come, as plain numbers."""
        adapted = self.damping.value if isinstance(self.damping, LevenbergMarquardt) else None
        return {"steps": self.steps, "refreshed": self.refreshed, "damping": adapted}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.steps, self.refreshed = state["steps"], state["refreshed"]
        if state["damping"] is not None and isinstance(self.damping, LevenbergMarquardt):
            self.damping.value = state["damping"]

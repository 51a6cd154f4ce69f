"""Comparing two runs where both have come equally far, not after equally many steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import described, require_real

_USUAL = ("loss", "train_loss", "progress")


@dataclass
class Curves(Mapping):
    """Curves recorded along a run: a mapping of names to tensors ``(records, ...)``.

    ``run.record(loss=0.7, clean=0.5, grid=tensor)`` appends one value to every curve of ``columns``, which hold them as
    lists. One column, ``loss`` by default, tells how far the run has come.
    """

    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def record(self, **values: Any) -> None:
        """Append one record, ``values`` by name of their curve; raises :class:`ArgumentError` unless it has the columns
        of the first one.
        """
        if self.columns and set(values) != set(self.columns):
            raise ArgumentError(
                f"a record has the columns {sorted(values)}; expected {sorted(self.columns)}, as in the first one"
            )
        for name, value in values.items():
            self.columns.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64).detach().cpu())

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(self.columns[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class EqualProgress:
    """Two runs at common thresholds of progress: every curve of ``a`` and ``b`` is ``(thresholds, ...)``, NaN where a
    run never got that far. ``index_a``, ``index_b``: at which record (a fraction, when interpolated) it did.
    """

    thresholds: Tensor
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    index_a: Tensor
    index_b: Tensor

    def difference(self, name: str) -> Tensor:
        """``a - b`` of the curve called ``name``, ``(thresholds, ...)``."""
        return self.a[name] - self.b[name]


def equal_progress(
    run_a: Mapping[str, Any],
    run_b: Mapping[str, Any],
    thresholds: Iterable[float] | Tensor,
    *,
    progress: str | None = None,
    falling: bool = True,
    interpolate: bool = True,
    smoothing: float = 0.0,
) -> EqualProgress:
    """Resample the curves of two runs where their progress first crosses each threshold.

    A run, ``run_a`` and ``run_b``, is a :class:`Curves`, any mapping of names to columns ``(records, ...)``, a list of
    mappings (one a record), or an object with such a ``.history``. A run that starts past a threshold counts as there
    at its first record.

    Args:
        thresholds: values of the progress, in any order.
        progress: the column that tells it, by default the first of ``loss``, ``train_loss``, ``progress``.
        falling: whether it falls; ``False`` where it grows, as an accuracy.
        interpolate: linear between the records around the crossing, else the first one past it.
        smoothing: in [0, 1), the weight of the past in a moving average of the progress that decides on crossings.

    Raises :class:`ArgumentError`. Source: George 2023, thesis, section 5.3.1.
    """
    require_real(smoothing, "smoothing")
    if not 0 <= smoothing < 1:
        raise ArgumentError(f"smoothing is {smoothing!r}; expected the weight of the past, in [0, 1)")
    if not isinstance(thresholds, (Tensor, Iterable)) or isinstance(thresholds, str):
        raise ArgumentTypeError(f"thresholds is {described(thresholds)}; expected a list of numbers")
    levels = _column(thresholds if isinstance(thresholds, Tensor) else list(thresholds), "thresholds").reshape(-1)
    columns = [_columns(run, which) for run, which in ((run_a, "run_a"), (run_b, "run_b"))]
    name = progress or next((n for n in _USUAL if all(n in c for c in columns)), None)
    if name is None or any(name not in c for c in columns):
        raise ArgumentError(
            f"progress is {progress!r}; expected a column of both runs, which have {sorted(columns[0])} and "
            f"{sorted(columns[1])}"
        )
    where = [
        first_crossing(c[name], levels, falling=falling, interpolate=interpolate, smoothing=smoothing) for c in columns
    ]
    common = [n for n in columns[0] if n in columns[1]]
    a, b = ({n: read_at(c[n], w) for n in common} for c, w in zip(columns, where))
    return EqualProgress(levels, a, b, *where)


def first_crossing(
    progress: Tensor, levels: Tensor, *, falling: bool = True, interpolate: bool = True, smoothing: float = 0.0
) -> Tensor:
    """The record ``(levels,)`` at which ``progress (records,)`` first reaches each level; NaN where it never does.

    Records without progress (NaN) are passed over: crossings lie between those that have it.
    """
    if progress.ndim != 1 or bool(progress.isnan().all()):
        raise ArgumentError(f"progress has shape {tuple(progress.shape)}; expected at least one number that is not NaN")
    if bool(levels.isnan().any()):
        raise ArgumentError(f"thresholds are {levels.tolist()}; expected numbers")
    record = (~progress.isnan()).nonzero().flatten()
    p = (progress if falling else -progress).to(torch.float64)[record]
    if smoothing:
        smooth = [p[0]]
        for value in p[1:]:
            smooth.append(smoothing * smooth[-1] + (1 - smoothing) * value)
        p = torch.stack(smooth)
    out = torch.full((len(levels),), torch.nan, dtype=torch.float64)
    for i, level in enumerate(levels if falling else -levels):
        reached = (p <= level).nonzero()
        if len(reached):
            k = int(reached[0])
            back = float((level - p[k]) / (p[k - 1] - p[k])) if interpolate and k else 0.0
            out[i] = float(record[k]) - back * float(record[k] - record[k - 1] if k else 0)
    return out


def read_at(curve: Tensor, index: Tensor) -> Tensor:
    """``curve (records, ...)`` at fractional records ``index (levels,)``, linearly; NaN stays NaN."""
    known = index.nan_to_num(0.0)
    lo = known.floor().long()
    hi = known.ceil().long()
    weight = (known - lo).view(-1, *[1] * (curve.ndim - 1))
    out = torch.where(weight > 0, curve[lo] * (1 - weight) + curve[hi] * weight, curve[lo])  # infinity times 0 is NaN
    out[index.isnan()] = torch.nan
    return out


def _column(x: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"{what} is {described(x)}; expected numbers of one shape") from None


def _columns(run: Any, which: str) -> dict[str, Tensor]:
    run = getattr(run, "history", run)
    if isinstance(run, (list, tuple)) and run and all(isinstance(record, Mapping) for record in run):
        odd = sorted({str(name) for record in run for name in record.keys() ^ run[0].keys()})
        if odd:
            raise ArgumentError(f"{which} has records with and without {odd[:4]}; expected the same columns in all")
        run = {name: [record[name] for record in run] for name in run[0]}
    if not isinstance(run, Mapping):
        raise ArgumentTypeError(
            f"{which} is {type(run).__name__}; expected Curves, or a mapping of names to columns of equal length"
        )
    columns = {name: _column(run[name], f"{name!r} of {which}") for name in run}
    lengths = {name: len(c) if c.ndim else 0 for name, c in columns.items()}
    if not columns or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ArgumentError(
            f"{which} has columns of lengths {lengths}; expected at least one, all of the same positive length"
        )
    return columns


@dataclass(frozen=True)
class Grid:
    """A square grid of points in the plane, to draw a function on: ``points (size^2, 2)``; ``image`` undoes the
    flattening. ``low``, ``high``: of both coordinates; ``size``: points a side.
    """

    low: float = -1.0
    high: float = 1.0
    size: int = 40

    @property
    def points(self) -> Tensor:
        """``(size * size, 2)``, row by row from the lowest second coordinate."""
        axis = torch.linspace(self.low, self.high, self.size)
        second, first = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([first.flatten(), second.flatten()], 1)

    def image(self, values: Tensor) -> Tensor:
        """``values (..., size * size) -> (..., size, size)``, to show with the origin below."""
        return values.unflatten(-1, (self.size, self.size))

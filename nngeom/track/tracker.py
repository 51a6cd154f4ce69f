"""A tracker: quantities of training geometry on a probe set every so many steps, kept as columns of numbers."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nngeom.analysis.complexity import evaluating
from nngeom.core.errors import ArgumentError, ArgumentTypeError, FileError
from nngeom.core.given_plainly import described, require_at_least, require_whole
from nngeom.core.html import card
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Function, Run
from nngeom.track.columns import as_columns, as_number, names_of
from nngeom.track.history import History
from nngeom.track.plots import dashboard
from nngeom.track.quantities import QUANTITIES, Look
from nngeom.track.writers import CSVWriter, TensorBoardWriter, Writer, append, csv_of, write_whole

DEFAULT = ("loss", "accuracy", "spectrum", "effective_rank", "alignment", "alignment_by_layer", "mgs", "coherence")
FORMAT = "nngeom-track-1"


class geometric:
    """A schedule: steps 0, 1, 2, ... each at least ``factor`` times the last, for plots against ``log(step)``."""

    def __init__(self, factor: float = 1.15) -> None:
        require_at_least(factor, "factor", 1.0, above=True)
        self.factor, self.last = factor, -1

    def __call__(self, step: int) -> bool:
        """Whether a step is due."""
        due = self.last < 0 or step >= max(self.last + 1, math.ceil(self.last * self.factor))
        if due:
            self.last = step
        return due


class Tracker:
    """Measures ``metrics`` of ``model`` on the batches of ``probe_loader``; call :meth:`step` after every optimiser
    step.

    ``metrics``: names (``nngeom.track.QUANTITIES``) and functions ``(model, batches) -> number or {column: number}``.
    ``every``: a number of steps, or a function ``step -> bool`` (``nngeom.track.geometric(1.15)``). The probe batches
    are read once and kept. The model is measured in evaluation mode and put back; global random state is not touched. A
    number of a function stands under the function's name, one of a second function of that name under ``name_2``, and
    so on.

    ``loss``: of the quantities that need one, as for :func:`nngeom.EmpiricalFIM`. ``csv``, ``tensorboard``: a file and
    a log directory that are written to as measurements come (the latter needs the extra ``tensorboard``), as are
    ``writers``, objects with the three methods of a :class:`Writer`. ``history``
    maps columns to lists of numbers of equal length, NaN where a number was not given. ``overhead`` is the share of
    wall time since the first :meth:`step` that went into measuring.

    Raises :class:`ArgumentError` for an unknown metric and where two numbers would stand in one column,
    :class:`LoaderError` for an empty probe loader.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_loader: Any,
        metrics: Sequence[str | Callable[..., Any]] = DEFAULT,
        every: int | Callable[[int], bool] = 100,
        *,
        loss: Any = "cross_entropy",
        function: Function = None,
        layer_collection: LayerCollection | None = None,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        writers: Iterable[Writer] = (),
    ):
        if isinstance(metrics, str) or not isinstance(metrics, Iterable):
            raise ArgumentTypeError(f"metrics is {described(metrics)}; expected a list of names and functions")
        metrics = tuple(metrics)
        odd = [m for m in metrics if not isinstance(m, str) and not callable(m)]
        if odd:
            raise ArgumentTypeError(f"metrics holds {described(odd[0])}; expected names and functions")
        unknown = [m for m in metrics if isinstance(m, str) and m not in QUANTITIES]
        if unknown:
            raise ArgumentError(
                f"metrics {unknown} are not known; expected some of {sorted(QUANTITIES)}, or functions (model, "
                "batches) -> number"
            )
        if not callable(every) and (not isinstance(every, int) or every < 1):
            raise ArgumentError(f"every is {every!r}; expected a whole number of at least 1, or a function of the step")
        self.model = model
        self.metrics = tuple(m for j, m in enumerate(metrics) if not isinstance(m, str) or m not in metrics[:j])
        self._names = names_of(self.metrics)
        self.every, self.loss, self.function, self.layer_collection = every, loss, function, layer_collection
        self.batches = Run.of(model, probe_loader, function=function, layer_collection=layer_collection).held().loader
        self.history = History({"step": []})
        self.writers: list[Writer] = [CSVWriter(csv)] if csv is not None else []
        self.writers += [TensorBoardWriter(tensorboard)] if tensorboard is not None else []
        self.writers += list(writers)
        self._written: set[int] = set()  # writers that have begun, by id
        self._begun: float | None = None
        self._elapsed = self._spent = 0.0

    # -- measuring -----------------------------------------------------------------------------------------------------

    def step(self, step: int, **scalars: float) -> dict[str, float] | None:
        """Measure if ``step`` is due: the new row, else ``None``. ``scalars`` (a running loss) are kept in the row."""
        require_whole(step, "step", 0)
        begin = time.perf_counter()
        if self._begun is None:
            self._begun = begin
        due = self.every(step) if callable(self.every) else step % self.every == 0
        return self.measure(step, **scalars) if due else None

    def measure(self, step: int, **scalars: float) -> dict[str, float]:
        """Measure now, due or not: the new row, at ``step`` and with ``scalars``, other numbers by name of their
        column.
        """
        require_whole(step, "step", 0)
        begin = time.perf_counter()
        if self._begun is None:
            self._begun = begin
        row: dict[str, float] = {"step": step, **{name: as_number(name, v) for name, v in scalars.items()}}
        with evaluating(self.model):
            look = Look(self.model, self.batches, self.loss, self.function, self.layer_collection)
            for metric, name in zip(self.metrics, self._names):
                if isinstance(metric, str):
                    new = QUANTITIES[metric](look)
                else:
                    new = as_columns(name, metric(self.model, self.batches))
                twice = sorted(row.keys() & new.keys())
                if twice:
                    raise ArgumentError(f"metric {name!r} gives {twice}, which the row has already; rename one of them")
                row.update(new)
        for writer in self.writers:
            if id(writer) not in self._written:
                self._written.add(id(writer))
                writer.begin(self.history)
        append(self.history, row)
        for writer in self.writers:
            writer.add(step, {name: x for name, x in row.items() if name != "step"})
        self._spent += time.perf_counter() - begin
        return row

    def close(self) -> None:
        """Close all writers."""
        for writer in self.writers:
            writer.close()

    @property
    def overhead(self) -> float:
        """Seconds spent measuring divided by all seconds since the first step, over resumed runs too; 0 before any."""
        running = 0.0 if self._begun is None else time.perf_counter() - self._begun
        total = self._elapsed + running
        return self._spent / total if total > 0 else 0.0

    # -- keeping -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """The history as a JSON file ``path``, written whole or not at all; raises :class:`FileError`."""
        running = 0.0 if self._begun is None else time.perf_counter() - self._begun
        last = getattr(self.every, "last", None)
        state = {
            "format": FORMAT,
            "elapsed": self._elapsed + running,
            "spent": self._spent,
            "last": last,
            "history": self.history,
        }
        write_whole(Path(path), json.dumps(state))

    def load(self, path: str | os.PathLike[str]) -> Tracker:
        """Go on from a file ``path`` of :meth:`save`: history, schedule and overhead; rows are appended. Raises
        :class:`FileError`.
        """
        try:
            state = json.loads(Path(path).read_text())
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                raise FileError(f"{path} is no tracker file of this version (format {FORMAT!r})")
            history = {str(name): [float(x) for x in column] for name, column in state["history"].items()}
            elapsed, spent, last = float(state["elapsed"]), float(state["spent"]), state["last"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{path} cannot be read as a tracker file: {error}") from error
        if "step" not in history or len({len(column) for column in history.values()}) != 1:
            raise FileError(f"{path} is damaged: its columns have different lengths")
        self.history, self._elapsed, self._spent, self._begun = History(history), elapsed, spent, None
        self._written.clear()
        if last is not None and hasattr(self.every, "last"):
            self.every.last = int(last)
        return self

    def to_pandas(self) -> Any:
        """The history as a ``pandas.DataFrame`` by step; raises :class:`MissingExtraError` without pandas."""
        return self.history.to_pandas()

    def _repr_html_(self) -> str:
        return card("Tracker", {"measurements": str(len(self.history["step"]))}, self.history.html())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """One row a measurement, one column a number, in the file ``path``; raises :class:`FileError`."""
        write_whole(Path(path), csv_of(self.history))

    def to_tensorboard(self, directory: str | os.PathLike[str]) -> None:
        """The whole history as TensorBoard scalars in ``directory``; raises :class:`MissingExtraError` without the
        extra ``tensorboard``.
        """
        writer = TensorBoardWriter(directory)
        for values in zip(*self.history.values()):
            row = dict(zip(self.history, values))
            writer.add(int(row["step"]), row)
        writer.close()

    def plot(self, path: str | os.PathLike[str] | None = None, title: str = "") -> Any:
        """The dashboard, written to ``path`` where given, with ``title`` above; the figure. Raises
        :class:`MissingExtraError` without the extra ``plot``.
        """
        return dashboard(self.history, path, title)

"""Where numbers go as they are measured: files, TensorBoard, and the loggers of others."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
from pathlib import Path
from typing import Any, Protocol

from nngeom.core.errors import ArgumentTypeError, FileError, MissingExtraError

Row = dict[str, float]
Columns = dict[str, list[float]]


class Writer(Protocol):
    """What a :class:`Tracker` writes to: three methods, of any class."""

    def begin(self, history: Columns) -> None:
        """Before the first row; ``history``: columns of the rows that a resumed run has already."""

    def add(self, step: int, row: Row) -> None:
        """The numbers of one measurement at ``step``, ``row``: ``{column: number}``, NaN where there is none."""

    def close(self) -> None:
        """Nothing more comes."""


class CSVWriter:
    """A file ``path`` of one row a measurement and one column a number, whole at every moment.

    Raises :class:`FileError` where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._history: Columns = {"step": []}

    def begin(self, history: Columns) -> None:
        """Rows of a resumed run, the ``history``, come first."""
        self._history = {name: list(column) for name, column in history.items()}

    def add(self, step: int, row: Row) -> None:
        """One ``row`` more, at ``step``."""
        append(self._history, {"step": step, **row})
        write_whole(self.path, csv_of(self._history))

    def close(self) -> None:
        """The file is complete."""


class TensorBoardWriter:
    """Scalars ``nngeom/column`` in a log ``directory``; raises :class:`MissingExtraError` without TensorBoard."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise MissingExtraError("TensorBoard is not installed; install it: pip install tensorboard") from error
        self._writer = module.SummaryWriter(str(directory))

    def begin(self, history: Columns) -> None:
        """The rows of ``history`` are in the directory already."""

    def add(self, step: int, row: Row) -> None:
        """The numbers of a ``row`` at ``step``, but those missing."""
        for name, value in prefixed(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbWriter:
    """Numbers ``nngeom/column`` of a Weights & Biases ``run``: what ``wandb.init()`` returned, or any object with its
    ``log(numbers, step=)``.

    Steps go with the numbers as ``nngeom/step`` too, because the run drops numbers of a step before its own. The run is
    not finished: it is yours. Raises :class:`ArgumentTypeError` for anything without ``log``.
    """

    def __init__(self, run: Any) -> None:
        self.run = _with(run, "log", "a run, as wandb.init() returns")

    def begin(self, history: Columns) -> None:
        """The run has the rows of ``history``; its numbers stand over their own steps where it can say so."""
        define = getattr(self.run, "define_metric", None)
        if define is not None:
            define("nngeom/*", step_metric="nngeom/step")

    def add(self, step: int, row: Row) -> None:
        """The numbers of a ``row`` at ``step``, but those missing."""
        self.run.log({**prefixed(row), "nngeom/step": step})

    def close(self) -> None:
        """The run goes on."""


class MLflowWriter:
    """Metrics ``nngeom/column`` of the active MLflow run: of the module ``mlflow``, or any object with its
    ``log_metrics(numbers, step=)``, ``client``.

    Raises :class:`ArgumentTypeError` for anything without ``log_metrics``.
    """

    def __init__(self, client: Any) -> None:
        self.client = _with(client, "log_metrics", "the module mlflow, within a run")

    def begin(self, history: Columns) -> None:
        """The run has the rows of ``history``."""

    def add(self, step: int, row: Row) -> None:
        """The numbers of a ``row`` at ``step``, but those missing."""
        self.client.log_metrics(prefixed(row), step=step)

    def close(self) -> None:
        """The run goes on."""


def prefixed(row: Row) -> Row:
    """``nngeom/column`` of a row, but for the step and what is missing; characters that loggers refuse are replaced."""
    kept = {name: value for name, value in row.items() if name != "step" and not math.isnan(value)}
    return {"nngeom/" + "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name): v for name, v in kept.items()}


def append(history: Columns, row: Row) -> None:
    """A row more; NaN where it, or those before, lack a column."""
    count = len(history["step"])
    for name in row:
        history.setdefault(name, [math.nan] * count)
    for name, column in history.items():
        column.append(row.get(name, math.nan))


def csv_of(history: Columns) -> str:
    """One line a measurement."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(history), *zip(*history.values())])
    return text.getvalue()


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a text, atomically; raises :class:`FileError` and leaves nothing half-written."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error


def _with(given: Any, method: str, expected: str) -> Any:
    if not callable(getattr(given, method, None)):
        raise ArgumentTypeError(f"{type(given).__name__} has no {method}(); expected {expected}")
    return given

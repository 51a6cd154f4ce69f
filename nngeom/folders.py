"""Matrices measured part by part into a folder: layers over sweeps, where their factors do not fit into memory at once.

A folder holds ``index.json``, what is measured and how it is cut, and a file a part. Parts are written whole or not at
all; the same call after an interruption goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.loaders import as_batches
from nngeom.core import files
from nngeom.core.errors import ArgumentError, FileError, LoaderError, MemoryWarning, UnsupportedError
from nngeom.core.registry import qualified
from nngeom.cotangents.loss import EveryOutput
from nngeom.io import load, save
from nngeom.opened_folder import FORMAT, file_of, index_of, opened
from nngeom.parts_folder import INDEX
from nngeom.pmat.in_files import PMatInFiles, require_stored
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation, as_representation
from nngeom.ranks.fingerprint import bits, described, digest_of
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep
from nngeom.sweep.watched import Watched
from nngeom.tree import encode

COPIES = 3  # of what a part holds, which lie in memory while it is made: sums, eigenvectors, and some in float64
NO_NUMBERS = {"progress", "check", "generator", "process_group", "estimator"}  # options that change none


def to_folder(
    path: str | os.PathLike[str],
    measure: Callable[..., Any],
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    **options: Any,
) -> PMatInFiles:
    """Measure a matrix that is larger than memory: some layers at a time, as many as fit the budget, into a folder.

    The numbers are those of ``measure(model, loader, representation, **options)``. Every part is a sweep of its own
    over the data, of its layers alone. What is there already is not measured again, and the same call after an
    interruption goes on; with everything there it reads the index only.

    Args:
        path: the folder; it is made where it is missing, in a folder that exists.
        measure: :func:`FIM`, :func:`GGN`, :func:`FIM_MonteCarlo`, :func:`EmpiricalFIM`, ... Draws are those of one
            matrix: all parts begin with the same state of ``generator=``, which the folder remembers.
        representation: one that keeps layers apart: KFAC, EKFAC, BlockDiag, QuasiDiag, Diag, mixtures of these, or a
            class of your own that says ``layerwise = True``. Its options, and those of the measure, are ``options``.
        memory_budget: bytes, of temporaries as for any measure, and of a part while it is made.

    ``model``, ``loader`` and ``layer_collection`` as for any measure, see :class:`Run`; the loader must give the same
    examples in every pass, in any order. Raises :class:`ArgumentError` for a folder of another matrix (what differs),
    or another kind of representation, :class:`LoaderError` for a loader that changes, :class:`FileError` where the
    folder cannot be used, :class:`UnsupportedError` with ``process_group=``, and what the measure raises.
    """
    if options.get("process_group") is not None:
        raise UnsupportedError("a folder is measured by one process; expected no process_group=")
    if options.get("estimator") is not None:
        raise UnsupportedError("an estimate with standard errors is not held by a folder; expected no estimator=")
    run = Run.of(
        model,
        list(as_batches(loader)) if isinstance(loader, Iterator) else loader,
        function=options.get("function"),
        layer_collection=layer_collection,
        memory_budget=memory_budget,
    )
    job = _Job.of(os.path.abspath(os.fsdecode(path)), measure, run, representation, options)
    with _locked(job.folder), run.within():
        job.begin()
        for j in job.missing():
            job.measure_part(j)
    return opened(job.folder, load)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """The folder, made if it is missing, for this call alone."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        there = [name for name in os.listdir(folder) if name != "lock" and not name.endswith(".part")]
        lock = files.Lock(os.path.join(folder, "lock")) if INDEX in there or not there else None
    except BlockingIOError as error:
        raise FileError(f"{folder!r} is being written by another process or thread; wait for it") from error
    except OSError as error:
        raise FileError(
            f"cannot use the folder {folder!r}: {error}; expected a path in an existing folder that can be written"
        ) from error
    if lock is None:
        raise FileError(
            f"{folder!r} has {there[:4]} and no {INDEX}, so it is not one of to_folder; expected an empty "
            "folder, or one that is not there"
        )
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Job:
    """One matrix, and what is known of its folder."""

    folder: str
    measure: Callable[..., Any]
    run: Run
    chosen: Representation[Any]
    options: dict[str, Any]
    draws: bool
    index: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(folder: str, measure: Callable[..., Any], run: Run, representation: Any, options: dict[str, Any]) -> _Job:
        """Raises :class:`ArgumentError` for a representation that joins layers."""
        taken = inspect.signature(measure).parameters
        own = {name: x for name, x in options.items() if name not in taken}
        chosen = as_representation(representation, **own).within(run.network.collection)
        if not chosen.layerwise:
            raise ArgumentError(
                f"{chosen.kind.__name__} joins layers, so it cannot be measured some layers at a time; expected "
                "PMatKFAC, PMatEKFAC, PMatBlockDiag, PMatQuasiDiag, PMatDiag or a mixture of these"
            )
        rest = {name: x for name, x in options.items() if name in taken}
        return _Job(folder, measure, run, chosen, rest, "generator" in taken and "estimator" not in taken)

    def begin(self) -> None:
        """Read the index, or write one; raises :class:`ArgumentError` where it is that of another matrix."""
        asked = self._asked()
        if not os.path.exists(os.path.join(self.folder, INDEX)):
            self.index = {
                "format": FORMAT,
                "collection": encode(self.run.network.collection, "", {}),
                "asked": asked,
                "state": self._state(),
                "parts": [list(names) for names in self._cut()],
            }
            self._write()
            return
        self.index = index_of(self.folder)
        there = self.index["asked"]
        odd = [name for name in {**asked, **there} if asked.get(name) != there.get(name)]
        if odd:
            raise ArgumentError(
                f"{self.folder!r} holds a matrix of other inputs, which differ in: {', '.join(odd[:8])}; expected the "
                "same call, or another folder"
            )

    def _asked(self) -> dict[str, str]:
        """What the numbers depend on, by name, but for the data."""
        network, generator = self.run.network, self.options.get("generator")
        named: dict[str, Tensor] = {f"parameter {name!r}": p for name, p in network.model.named_parameters()}
        named |= {f"buffer {name!r}": b for name, b in network.model.named_buffers()}
        found = {
            "the measure": qualified(self.measure),
            "the representation": digest_of(described(self.chosen)),
            "layer_collection": digest_of((network.collection.names, network.collection.shapes)),
        }
        found |= {f"{name}=": digest_of(described(x)) for name, x in self.options.items() if name not in NO_NUMBERS}
        if self.draws and generator is not None:
            found["generator="] = digest_of(bits([generator.get_state()]))
        return found | dict(zip(named, bits(named.values())))

    def _state(self) -> list[int] | None:
        """Where the random numbers of every part begin."""
        if not self.draws:
            return None
        generator = self.options.get("generator")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        state: list[int] = generator.get_state().tolist()
        return state

    def _cut(self) -> Iterator[tuple[str, ...]]:
        """The names of the parameters of every part: neighbouring layers that fit the budget together."""
        budget, part, held = self.run.memory_budget, tuple[str, ...](), 0
        for layer, names, size in self._sizes():
            if size > budget:
                warnings.warn(
                    f"memory_budget is {budget} bytes, but the layer {layer!r} takes about {size} while it is "
                    "measured; it is a part of its own",
                    MemoryWarning,
                    stacklevel=5,
                )
            if part and held + size > budget:
                yield part
                part, held = (), 0
            part, held = part + names, held + size
        yield part

    def _sizes(self) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """The layers, their parameters, and how many bytes each takes while it is made, by the rows of one batch."""
        network = self.run.network
        chunk = next(Sweep(self.run.silent(), EveryOutput()).but(part_of=self.chosen.division).chunks())
        selection, numbers = Selection.of(network.collection), dict[str, int]()
        for layout, j in chunk.jacobians.items():
            held = self.chosen.entries_of(layout, j, selection)
            numbers[layout.names[0]] = layout.numel if held is None else held
        itemsize = torch.promote_types(network.dtype, torch.float32).itemsize
        for layer, names in network.collection.by_layer().items():
            yield layer, names, COPIES * itemsize * sum(numbers.get(name, 0) for name in names)

    def missing(self) -> list[int]:
        """The parts that are not there yet."""
        return [j for j in range(len(self.index["parts"])) if not os.path.exists(file_of(self.folder, j))]

    def measure_part(self, j: int) -> None:
        """Measure a part, compare the examples that it saw with those that others saw, and write it."""
        part, watched = self.run.network.collection.only(self.index["parts"][j]), Watched(self.run.loader)
        options, generator = dict(self.options), self.options.get("generator")
        if self.index["state"] is not None:
            options["generator"] = torch.Generator("cpu" if generator is None else generator.device)
            options["generator"].set_state(torch.tensor(self.index["state"], dtype=torch.uint8))
        options |= {"layer_collection": part, "memory_budget": self.run.memory_budget}
        found = self.measure(self.run.network.model, watched, self.chosen.among(part), **options)
        matrix = require_stored(found, self.measure.__name__)
        if generator is not None and self.index["state"] is not None:
            generator.set_state(options["generator"].get_state())  # as one measure leaves it
        said = {"examples": matrix.examples, "kind": [type(matrix).__name__, qualified(type(matrix))]}
        said |= {"dtype": str(matrix.dtype).removeprefix("torch.")}
        if len(watched.seen | {self.index.get("data", min(watched.seen))}) > 1:
            raise LoaderError(
                "the loader gives other examples every time it is gone through, and the parts of a matrix are means "
                "over the same; expected a loader without random changes of its examples, or list(loader)"
            )
        if "data" not in self.index:
            self.index |= {"data": min(watched.seen), **said}
            self._write()
        save(matrix, file_of(self.folder, j))

    def _write(self) -> None:
        with files.replaced(os.path.join(self.folder, INDEX)) as part, open(part, "w") as file:
            json.dump(self.index, file)

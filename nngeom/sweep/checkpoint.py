"""Where a long measure keeps what it has: a folder that says of what measure, with the sums of its sweeps."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nngeom.core import container, files
from nngeom.core.errors import ArgumentError, ArgumentTypeError, FileError
from nngeom.core.given_plainly import as_path
from nngeom.ranks.fingerprint import described, digest_of
from nngeom.sweep.agreement import digests, values_of
from nngeom.sweep.run import Run

INDEX = "measure.json"
FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """A ``folder`` to keep sums in ``every`` so many minutes; ``drawn``: the seed was drawn for this call alone."""

    folder: str
    every: float
    drawn: bool = False

    @staticmethod
    def of(checkpoint: Any, every: Any, *, drawn: bool = False) -> Asked | None:
        """From the arguments of a measure, checked; ``None`` where nothing is to be kept."""
        if checkpoint is None:
            return None
        try:
            folder = os.path.abspath(as_path(checkpoint))
        except TypeError:
            raise ArgumentTypeError(f"checkpoint is {checkpoint!r}; expected the path of a folder") from None
        if isinstance(every, bool) or not isinstance(every, (int, float)) or not 0 <= every < math.inf:
            raise ArgumentError(f"every is {every!r}; expected minutes, a number of at least 0")
        return Asked(folder, float(every), drawn)

    @contextlib.contextmanager
    def begun(self, run: Run, **settings: Any) -> Iterator[Checkpoint]:
        """The folder of this measure, made or found, and nobody else's meanwhile; ``settings``: what makes it another
        one, ``seed`` among them, which is that of the folder where it was only ``drawn``.

        Raises :class:`ArgumentError` where it holds another measure, :class:`FileError` where it cannot be written or
        is damaged.
        """
        team, seed = run.team, settings.pop("seed", None)
        with contextlib.ExitStack() as held:
            with team.together("checkpoint") as note:
                about = {**_values(run), **{name: digest_of(described(x)) for name, x in settings.items()}}
                about["processes"] = str(team.size)
                if not self.drawn and seed is not None:
                    about["generator"] = str(seed)
                note.mine = self._index(about, seed, held) if team.rank == 0 else None
            yield Checkpoint(self, run, digest_of(sorted(about.items())), note.all[0])

    def _index(self, about: dict[str, str], seed: int | None, held: contextlib.ExitStack) -> int | None:
        """The seed of the folder, which is begun with this one where there is none."""
        path = os.path.join(self.folder, INDEX)
        try:
            if not os.path.isdir(self.folder):
                os.mkdir(self.folder)
            held.callback(files.Lock(os.path.join(self.folder, "lock")).release)
            if not os.path.exists(path):
                with files.replaced(path) as part, open(part, "w") as file:
                    json.dump({"format": FORMAT, "about": about, "seed": seed}, file, indent=1)
            with open(path, "rb") as file:
                found = container.json_of(file.read())
        except BlockingIOError:
            raise FileError(
                f"another call keeps its sums in {self.folder!r} now; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise FileError(
                f"cannot write the folder {self.folder!r}: {error}; expected a path in an existing folder that can be "
                "written"
            ) from error
        except ValueError as error:
            raise self._foreign(str(error)) from error
        if not isinstance(found.get("about"), dict) or not isinstance(found.get("format"), int):
            raise self._foreign("it does not say of what measure it is")
        if found["format"] > FORMAT:
            raise FileError(f"{path!r} has format {found['format']}, this version reads up to {FORMAT}; upgrade nngeom")
        names = {name: None for name in (*about, *found["about"])}
        odd = [name for name in names if about.get(name) != found["about"].get(name)]
        if odd:
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            raise ArgumentError(
                f"{self.folder!r} holds sums of another measure, which differs in: {', '.join(odd[:4])}{more}; use the "
                "same model, data and options, another folder as checkpoint=, or delete it"
            )
        seed = found.get("seed")
        if seed is not None and type(seed) is not int:
            raise self._foreign(f"its seed is {seed!r}")
        return seed

    def _foreign(self, why: str) -> FileError:
        return FileError(
            f"{os.path.join(self.folder, INDEX)!r} is damaged, or not of this library: {why}; delete the folder to "
            "measure anew, or choose another as checkpoint="
        )


@dataclass(frozen=True)
class Checkpoint:
    """A folder in use, of a measure that is called ``about``, with the ``seed`` of its draws."""

    asked: Asked
    run: Run
    about: str
    seed: int | None

    def path(self, sweep: int) -> str:
        """Where this process keeps the sums of a ``sweep``, by its number."""
        part = f"sweep-{sweep}.part-{self.run.team.rank:05d}-of-{self.run.team.size:05d}.safetensors"
        return os.path.join(self.asked.folder, part)

    def seeded(self, cotangents: Any) -> Any:
        """The ``cotangents`` with the seed of the folder, where they have one."""
        return cotangents if self.seed is None else replace(cotangents, seed=self.seed)


def _values(run: Run) -> dict[str, str]:
    """What makes the model another one."""
    model = run.network.model
    tensors: dict[str, Tensor] = {f"parameter {n!r}": p for n, p in model.named_parameters(remove_duplicate=False)}
    tensors |= {f"buffer {n!r}": b for n, b in model.named_buffers(remove_duplicate=False)}
    values = {name: text for name, text in values_of(run).items() if name != "torch"}
    values |= digests(run, tensors)
    return {**values, "function": described(run.network.function)}

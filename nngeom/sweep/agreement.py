"""What all processes of a measure agree on before they start: model, numbers in it, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.stream import Numbers
from nngeom.ranks.data import warn_of_same
from nngeom.ranks.fingerprint import bits, described
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep, require_examples


def agree(run: Run, what: str, **settings: Any) -> None:
    """Raise :class:`RankMismatchError`, naming what differs and on which ranks, unless ``what`` is called with the same
    ``settings`` of the same model everywhere; its numbers are compared where the run is checked.
    """
    team = run.team
    if team.size == 1:
        return
    with run.whole(), team.together(what):
        values = values_of(run) | {name: described(x) for name, x in settings.items()}
    team.same(what, values)


def values_of(run: Run) -> dict[str, str]:
    """What is compared of the model of a ``run``, by name."""
    model, selected = run.network.model, set(run.network.parameters)
    named = {f"parameter {n!r}": p for n, p in model.named_parameters(remove_duplicate=False)}
    held = {f"buffer {n!r}": b for n, b in model.named_buffers(remove_duplicate=False)}
    values = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in (named | held).items()}
    values["selected parameters"] = ", ".join(sorted(selected))
    values["torch"] = str(torch.__version__)
    if run.check:
        values |= digests(run, {**named, **held})
    return values


def digests(run: Run, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What tells the numbers of parameters and buffers apart, by name."""
    texts = bits(map(run.network.value, tensors.values()))
    return {f"the digest of {name}": text for name, text in zip(tensors, texts)}


def numbered(sweep: Sweep, index: Any = None) -> Sweep:
    """The sweep with its draws keyed by the numbers of examples over all processes, in rank order, or by ``index``, and
    by the seed of rank 0.

    Raises :class:`ArgumentTypeError` for an ``index`` that cannot be called, :class:`ArgumentError` where nothing is
    drawn.
    """
    cotangents: Any = sweep.cotangents
    team, draws = sweep.run.team, hasattr(cotangents, "numbers")
    require_draws(index, drawn=draws)
    if not draws or (team.size == 1 and index is None):
        return sweep
    sweep = sweep.held() if index is None else sweep
    with team.together("examples") as note:
        note.mine = cotangents.seed, sweep.run.count() if index is None else 0
    numbers = Numbers(sum(n for _, n in note.all[: team.rank]), index)
    return replace(sweep, cotangents=replace(cotangents, seed=note.all[0][0], numbers=numbers))


def require_draws(index: Any, *, drawn: bool) -> None:
    """Raise where an ``index`` is no function, or given to a measure in which nothing is ``drawn``."""
    if index is not None and not callable(index):
        raise ArgumentTypeError(f"index is {index!r}; expected a function index(batch) -> (n,), the examples' numbers")
    if index is not None and not drawn:
        raise ArgumentError("index= goes with draws (FIM_MonteCarlo, estimator='rademacher'); this measure is exact")


def first_look(run: Run, look: Callable[[], Sweep]) -> Sweep:
    """The sweep that ``look()`` returns, over batches that are held, after every process has looked at its own; raises
    :class:`LoaderError` where none of them has any.
    """
    with run.team.together("first look") as note:
        sweep = look()
        note.mine = run.met.get(0), sum(sweep.run.sizes) if run.team.size > 1 else 1
    warn_of_same(note.all)
    require_examples(sum(n for _, n in note.all))
    return sweep

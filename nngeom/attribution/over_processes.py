"""Influence over several processes: each scores its own training examples, for the queries of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.attribution.found import Influence
from nngeom.attribution.scoring import Question, Scores
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.places import Places
from nngeom.fmat.side import Side
from nngeom.fmat.store import Place, Store
from nngeom.fmat.team_store import TeamStore
from nngeom.fmat.visits import visiting
from nngeom.ranks.team import ALONE, Team
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import require_examples


def over_processes(run: Run, queries: Any, question: Question, out: Any) -> Influence:
    """The influence of the training examples of all processes on the queries of all, whole on each."""
    team = run.team
    with contextlib.nullcontext() if out is None else TeamStore(out, team) as store:
        with team.together("batches"):
            run = run.held()
            side = question.side(run, queries)
        every = queries_of_all(team, side)
        alone, places = divided(run)
        if store is None:
            return _whole(question, alone, every, places)
        return _in_file(question, alone, every, (places, store))


def divided(run: Run) -> tuple[Run, Places]:
    """A ``run`` that is held as one of this process alone, under the smallest memory budget, and where its training
    examples lie among those of all.
    """
    counts = run.team.exchange("examples", (sum(run.sizes), run.memory_budget))
    places = Places(run.team, tuple(n for n, _ in counts), 1)
    require_examples(places.total)
    return replace(run, team=ALONE, memory_budget=min(budget for _, budget in counts)), places


def queries_of_all(team: Team, side: Side) -> list[Any]:
    """The batches of the queries of all processes, in rank order."""
    found = {team.rank: list(side.run.loader)}
    for step, batches in enumerate(visiting(team, side, team.size - 1), 1):
        found[(team.rank - step) % team.size] = batches
    every = [batch for rank in range(team.size) for batch in found[rank]]
    require_examples(len(every))
    return every


def _whole(question: Question, run: Run, every: list[Any], places: Places) -> Influence:
    """All that is kept, put together from what each process has."""
    return joined(question, places, run.network.device, lambda: _own(question, run, every))


def _own(question: Question, run: Run, every: list[Any]) -> Influence | None:
    return question.scores(run, question.side(run, every)).influence() if run.loader else None


def joined(
    question: Question, places: Places, device: torch.device, found: Callable[[], Influence | None]
) -> Influence:
    """What every process ``found`` for its own training examples, ``None`` without any, put together on all."""
    with places.team.together("influence") as note:
        own = found()
        note.mine = None if own is None else {name: _kind(t) for name, t in _tensors(own).items()}
    kinds: Mapping[str, Any] = next(said for said in note.all if said is not None)
    mine = {} if own is None else _tensors(own)
    if question.top is not None:
        places, kept = replace(places, counts=tuple(min(question.top, n) for n in places.counts)), places
        if "indices" in mine:
            mine["indices"] = mine["indices"] + kept.mine.start
    whole = {name: places.whole(mine.get(name, _none(kind, device))) for name, kind in kinds.items() if name != "own"}
    if question.top is not None:
        values, at = whole["values"].topk(min(question.top, whole["values"].shape[1]), 1)
        whole |= {"values": values, "indices": whole["indices"].gather(1, at)}
        places = kept
    self_scores = places.whole(mine.get("own", _none(kinds["own"], device)))[0] if "own" in kinds else None
    layers = {name.removeprefix("layer "): t for name, t in whole.items() if name.startswith("layer ")}
    return Influence(whole.get("scores"), self_scores, whole.get("values"), whole.get("indices"), layers)


def _tensors(x: Influence) -> dict[str, Tensor]:
    """What there is, by name, training examples along the second axis."""
    found = {"scores": x.scores, "values": x.values, "indices": x.indices}
    found |= {f"layer {name}": t for name, t in x.by_layer.items()}
    found["own"] = None if x.self_scores is None else x.self_scores[None]
    return {name: t for name, t in found.items() if t is not None}


def _kind(t: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return t.shape[0], tuple(t.shape[2:]), t.dtype


def _none(kind: tuple[int, tuple[int, ...], torch.dtype], device: torch.device) -> Tensor:
    rows, rest, dtype = kind
    return torch.zeros(rows, 0, *rest, dtype=dtype, device=device)


# -- in a file ---------------------------------------------------------------------------------------------------------


def _in_file(question: Question, run: Run, every: list[Any], where: tuple[Places, TeamStore]) -> Influence:
    """The scores in one file, of which each process writes the columns of its own training examples."""
    places, store = where
    team = places.team
    with team.together("fingerprint") as note:
        scores = question.scores(run, question.side(run, every), Columns(store, places.mine.start))
        own = Fingerprint.of(scores.side, Side(scores.sweep), centered=False, metric=scores.metric.stored)
        note.mine = own, scores.side.examples
    split = {"processes": team.size, "examples of each": places.counts}
    about = Fingerprint.over([said for said, _ in note.all], **split)
    there = store.begin((note.all[0][1], places.total), question.metric.dtype, about)
    with team.together("influence"):
        found = _computed(scores, known=there is not None)
    if there is None:
        there = store.result()
    return Influence(there[""], places.whole(found[None])[0], None, None, {})


def _computed(scores: Scores, *, known: bool) -> Tensor:
    """The scores of this process's examples for themselves, after all others unless these are ``known``."""
    scores.known = known
    own = scores.over_all() if scores.sweep.run.loader else None
    return torch.zeros(0, dtype=scores.metric.dtype, device=scores.side.device) if own is None else own


class Columns(Store):
    """The columns of a file from ``start`` on."""

    def __init__(self, store: Store, start: int) -> None:
        super().__init__(store.names)
        self.store, self.start = store, start

    def has(self, place: Place) -> bool:
        return self.store.has(self._moved(place))

    def write(
        self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]
    ) -> None:
        self.store.write(self._moved(place), tiles, mirror, flip)

    def _moved(self, place: Place) -> Place:
        j, i = place
        return j, slice(i.start + self.start, i.stop + self.start)

    def result(self) -> dict[str, Tensor]:
        """Nothing: a file is finished as a whole."""
        return {}

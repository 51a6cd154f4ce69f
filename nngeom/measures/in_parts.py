"""Matrices whose blocks do not fit a process together: some layers a sweep over the data, each kept by one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from nngeom.core.errors import StructureError
from nngeom.core.linalg import accumulation_dtype
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.made import assigned
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep, require_examples


def in_parts(sweep: Sweep, whole: Representation[PMat], measure: Callable[[Run], PMat]) -> PMatSharded:
    """The matrix that ``measure(run)`` gives of some of the parameters, for groups of layers whose sums take half of
    the memory budget, or for a single layer; each process keeps the blocks of its own layers.

    Raises :class:`StructureError` where a block reaches over several layers, :class:`LoaderError` without examples.
    """
    sweep = sweep.held()
    run, collection = sweep.run, sweep.run.network.collection
    sizes = sizes_of(sweep, whole)
    owners = owners_of(sizes, run.team.size)
    dtype = accumulation_dtype(run.network.dtype)
    layers, parts, examples = collection.by_layer(), list[PMat](), 0
    for group in grouped(sizes, run.memory_budget // (2 * dtype.itemsize)):
        names = tuple(name for layer in group for name in layers[layer])
        some = replace(run, network=run.network.only(names), left_to_fallback=set())
        matrix = measure(some)
        own = {name for layer in group if owners[layer] == run.team.rank for name in layers[layer]}
        parts += [matrix[own.__contains__]] if own else []
        examples = matrix.examples
    return of_parts(run, owners, parts, examples, matrix.dtype)


def of_parts(
    run: Run, owners: Mapping[str, int], parts: Sequence[PMat], examples: int, dtype: torch.dtype
) -> PMatSharded:
    """The matrix of a run, a mean over ``examples``, of which this process keeps the ``parts`` and each its own."""
    collection = run.network.collection
    owned = [
        tuple(name for name, layer in zip(collection.names, collection.layers) if owners[layer] == rank)
        for rank in range(run.team.size)
    ]
    like = torch.empty(0, dtype=dtype, device=run.network.device)
    return PMatSharded(collection, tuple(parts), tuple(owned), examples, run.team, like)


def grouped(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Neighbours of together at most so many numbers, or one by itself."""
    groups: list[list[str]] = []
    total = 0
    for layer, size in sizes.items():
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(layer)
        total += size
    return groups


def owners_of(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which process keeps the blocks of which layer."""
    return assigned({layer: float(size) ** 1.5 for layer, size in sizes.items()}, ranks)


def sizes_of(sweep: Sweep, whole: Representation[PMat]) -> dict[str, int]:
    """How many numbers are held for every layer while it is measured, read off the first rows, the same on all
    processes.
    """
    run, found = sweep.run, dict[str, int]()
    collection = run.network.collection
    layer_of = dict(zip(collection.names, collection.layers))
    with run.within(), run.team.together("first look") as note:
        chosen = whole.within(collection)
        chunk = next(sweep.but(part_of=chosen.division, any_columns=chosen.any_columns).chunks(), None)
        for layout, j in {} if chunk is None else chunk.jacobians.items():
            layer, *others = dict.fromkeys(layer_of[name] for name in layout.names)
            if others:
                raise StructureError(
                    f"the parameters {list(layout.names)[:4]} share a block and lie in the layers {layer!r} and "
                    f"{others[0]!r}; measure {whole.kind.__name__} as a whole"
                )
            numbers = chosen.entries_of(layout, j, Selection.of(collection))
            found[layer] = found.get(layer, 0) + (layout.numel if numbers is None else numbers) * chosen.passes
        note.mine = found, 0 if chunk is None else chunk.examples
    require_examples(sum(n for _, n in note.all))
    return {layer: max(1, *(sizes.get(layer, 0) for sizes, _ in note.all)) for layer in collection.by_layer()}

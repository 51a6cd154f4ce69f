"""The saved state of parts of an optimizer's curvature: cut to layers, and put together from several processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.optim.curvature import Curvature


def part_state(key: Any, part: Curvature) -> tuple[Any, dict[str, Any]]:
    """Under which name a part is saved, the same on all processes and of no other part, and its state; of one that
    another process keeps, only whose it is.
    """
    if not isinstance(key, tuple):
        return key, part.state()
    index, names = key[0], list(part.selection.names)
    state = part.state() if part.mine else {"names": names}
    owned = part.manner.owner is not None
    return f"{index} {names[0]}", {**state, "part": index, "owned": owned, "known": part.known}


def converted(state: Any, dtypes: set[torch.dtype], like: Tensor) -> Any:
    """A ``state`` of parts on the device of ``like``; numbers of other ``dtypes`` than those of this model's sums, as
    of a model in another precision, in that of ``like``.
    """
    if isinstance(state, Tensor):
        other = state.is_floating_point() and state.dtype not in dtypes
        return state.to(like) if other else state.to(like.device)
    if isinstance(state, dict):
        return {key: converted(value, dtypes, like) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(converted(value, dtypes, like) for value in state)
    return state


def resume(part: Curvature, entries: Sequence[dict[str, Any]]) -> None:
    """A ``part`` takes over what states of the same index, the ``entries``, hold of it."""
    mine = set(part.selection.names)
    entries = [entry for entry in entries if not mine.isdisjoint(entry["names"])]
    for entry in entries:
        _require_same(part, entry)
    if part.mine:
        part.load(taken(entries, list(part.selection.names)))
    else:
        part.elsewhere = any(entry.get("known", bool(entry.get("blocks"))) for entry in entries)


def _require_same(part: Curvature, entry: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` where an ``entry`` is no state of such a ``part``; older ones do not say it all."""
    kind = entry.get("kind", part.kind)
    if kind != part.kind:
        raise ArgumentError(
            f"the state of {list(entry['names'])[:2]} is that of {kind}, and this optimizer keeps {part.kind}; "
            "expected the state_dict() of one of the same kind and options"
        )
    shapes, mine = dict(zip(entry["names"], entry.get("shapes", []))), dict(zip(part.selection.names, part.shapes))
    for name in shapes.keys() & mine.keys():
        if list(shapes[name]) != mine[name]:
            raise ArgumentError(
                f"the state belongs to another model: {name!r} is {tuple(shapes[name])} there and {tuple(mine[name])} "
                "here"
            )


def taken(entries: Sequence[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The state of the parameters called ``names``, of ``entries`` that hold those of some layers each.

    Raises :class:`ArgumentError` where one of them is not there.
    """
    missing = [entry["names"] for entry in entries if "averages" not in entry]
    if missing:
        raise ArgumentError(
            f"the state is that of one process, without the curvature of {missing[0][:4]}, which another kept; "
            "expected those of all: nng.optim.join_states([state of rank 0, state of rank 1, ...])"
        )
    if len(entries) == 1 and entries[0]["names"] == names:
        return entries[0]
    inside, mine = [name for entry in entries for name in entry["names"]], set(names)
    averages = [a for entry in entries for a in entry["averages"] if mine.issuperset(_names(a[0], inside))]
    blocks = [block for entry in entries for block in entry["blocks"]]
    if any(not mine.issuperset(named) and not mine.isdisjoint(named) for named in map(_block_names, blocks)):
        blocks = []  # over other layers too: made anew from the averages
    state = {"names": names, "averages": averages, "blocks": [b for b in blocks if mine.issuperset(_block_names(b))]}
    spectra = [entry["spectrum"] for entry in entries if "spectrum" in entry]
    if not spectra:
        return state
    return state | {"spectrum": {key: _along(key, entries, mine) for key in spectra[0]}}


def _along(key: str, entries: Sequence[dict[str, Any]], mine: set[str]) -> Any:
    """One value of a spectrum: what has a number for each eigenvector is cut to those of the parameters in ``mine``."""
    parts = []
    for entry in entries:
        value = entry["spectrum"][key]
        sizes = [block[2]["d"].numel() for block in entry["blocks"]]
        if not isinstance(value, Tensor) or value.numel() != sum(sizes):
            return value
        parts += [x for x, b in zip(value.split(sizes), entry["blocks"]) if mine.issuperset(_block_names(b))]
    return torch.cat(parts) if parts else torch.zeros(0)


def _names(plain: list[Any], inside: Iterable[str]) -> Iterable[str]:
    """The parameters of a block as :func:`plain_block` writes it; those ``inside`` of the part where it does not
    say.
    """
    return [name for piece in plain[1] for name in piece[0]] if plain[0] == "layout" else inside


def _block_names(block: list[Any]) -> list[str]:
    return [name for piece in block[0] for name in piece[0]]


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of the ``states`` of all processes, ``state_dict()`` of each, where each kept layers of its own
    (``placement="owned"``): every optimizer of the same kind resumes from it, in any number of processes and with any
    placement.

    Raises :class:`ArgumentError` where there is none, or the curvature of some parameter is in none of them.
    """
    if not states:
        raise ArgumentError("states is empty; expected the state_dict() of every process")
    parts: dict[Any, Any] = {}
    for state in states:
        for key, entry in state["curvature"]["parts"].items():
            if key not in parts or "averages" in entry:
                parts[key] = entry
    missing = [name for entry in parts.values() if "averages" not in entry for name in entry["names"]]
    if missing:
        raise ArgumentError(
            f"the curvature of {missing[:4]} is in none of the {len(states)} states; expected those of all processes"
        )
    return {**states[0], "curvature": {**states[0]["curvature"], "parts": parts}}

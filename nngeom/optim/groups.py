"""Parameter groups: what must hold of them, and what of them is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import described
from nngeom.optim.arguments import number

Group = dict[str, Any]


def as_groups(params: Iterable[Any]) -> list[Any]:
    """Groups with lists of parameters, of parameters too that are given without any."""
    if not isinstance(params, Iterable) or isinstance(params, (str, Tensor)):
        raise ArgumentTypeError(f"params is {described(params)}; expected parameters, or groups of them as dicts")
    listed = list(params)
    odd = [x for x in listed if not isinstance(x, (Tensor, dict, tuple))]
    if odd:
        raise ArgumentTypeError(f"params holds {described(odd[0])}; expected parameters, or groups of them as dicts")
    if not any(isinstance(x, dict) for x in listed):
        return [{"params": listed}]
    return [{**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in listed]


def require_groups(groups: list[Group], parameters: Mapping[str, Tensor]) -> None:
    """Raise :class:`ArgumentError` where a parameter is in no group, or a number of a group is out of range."""
    grouped = {id(p) for group in groups for p in group["params"]}
    left = [name for name, p in parameters.items() if id(p) not in grouped]
    if left:
        raise ArgumentError(
            f"parameters {left[:4]} are in no group of params; put them in one, or leave them out with layer_collection"
        )
    for group in groups:
        for key in ("lr", "momentum", "weight_decay"):
            number(key, group[key], 0)


def plain(groups: list[Group]) -> list[Group]:
    """Without callables, which are no part of a saved state."""
    return [{k: v for k, v in group.items() if not callable(v)} for group in groups]


def resumed(groups: list[Group], saved: Any) -> list[Group]:
    """The saved groups, with the callables of the present ones; raises :class:`ArgumentError` where they differ in
    number or size.
    """
    if not isinstance(saved, (list, tuple)) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ArgumentError("the state holds no param_groups; expected the state_dict() of the same kind of optimizer")
    mine, theirs = ([len(group["params"]) for group in some] for some in (groups, saved))
    if mine != theirs:
        raise ArgumentError(
            f"the state has groups of {theirs} parameters, and this optimizer of {mine}; expected the same params= and "
            "layer_collection="
        )
    return [{**{k: v for k, v in mine.items() if callable(v)}, **group} for mine, group in zip(groups, saved)]

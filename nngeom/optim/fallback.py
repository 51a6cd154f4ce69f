"""Parameters outside of the collection, stepped by AdamW inside the same optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.optim.arguments import number
from nngeom.optim.causes import broken
from nngeom.optim.groups import Group
from nngeom.space.collection import unwrap


class Fallback:
    """``torch.optim.AdamW`` on the groups that say ``"fallback": True``, with the state of the whole optimizer.

    ``settings``: of AdamW, or ``True`` for its defaults, ``None`` where groups say so one by one; ``outside``: the
    parameters that it may be given, by name. Raises :class:`ArgumentError` where there is none, or AdamW refuses.
    """

    def __init__(self, settings: Any, outside: Mapping[str, Tensor]):
        self.outside, self.asked = dict(outside), settings is not None and settings is not False
        if isinstance(settings, bool) or settings is None:
            settings = {}
        if not isinstance(settings, Mapping):
            raise ArgumentTypeError(
                f"fallback is {type(settings).__name__}; expected settings of torch.optim.AdamW as a dict, such as "
                "fallback=dict(lr=3e-4, weight_decay=0.1), or True"
            )
        if self.asked and not outside:
            raise ArgumentError(
                "fallback is for parameters outside of the collection, and there is none: leave some out, with "
                "layer_collection=LayerCollection.from_model(model, exclude=[nn.Embedding, nn.LayerNorm])"
            )
        try:
            self.adamw = torch.optim.AdamW(list(outside.values()) or [torch.zeros(())], **settings)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"fallback={dict(settings)!r} is refused by torch.optim.AdamW: {error}") from error

    def completed(self, groups: list[Group]) -> list[Group]:
        """The ``groups`` with all settings of AdamW where it steps them, and one more of what is in none."""
        groups = [self.complete(group) for group in groups]
        given = {id(p[1] if isinstance(p, tuple) else p) for g in groups for p in g["params"]}
        left = [p for p in self.outside.values() if id(p) not in given]
        return [*groups, self.complete({"params": left, "fallback": True})] if self.asked and left else groups

    def complete(self, group: Group) -> Group:
        """A group with all settings of AdamW, where that steps it."""
        return {**self.adamw.defaults, "momentum": 0.0, **group} if group.get("fallback") else group

    def broken(self, groups: list[Group]) -> str | None:
        """Whose gradient is not finite, in words."""
        mine = {id(p) for group in groups if group.get("fallback") for p in group["params"]} if self.outside else set()
        return None if not mine else broken({name: p for name, p in self.outside.items() if id(p) in mine})

    def step(self, groups: list[Group], state: Any, step: int) -> None:
        """AdamW's step."""
        mine = [{**g, "lr": number("lr", g["lr"], step)} for g in groups if g.get("fallback")]
        if mine:
            self.adamw.param_groups, self.adamw.state = mine, state
            self.adamw.step()


def outside(model: nn.Module, inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters of a model that are not ``inside``."""
    known = set(map(id, inside.values()))
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad and id(p) not in known}


def natural(groups: list[Group]) -> list[Group]:
    """The groups that are preconditioned."""
    return [group for group in groups if not group.get("fallback")]

"""The model an optimizer is given: a module, of this process alone.

The rows of per-example gradients are those of a process's own examples, while ``.grad`` of a model replicated over
several processes is the mean over all: preconditioned by curvatures that differ, the replicas would drift apart.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nngeom.core.errors import ArgumentTypeError, RankMismatchError, UnsupportedError
from nngeom.ranks.team import ALONE, Team


def require_model(model: Any, team: Team = ALONE) -> nn.Module:
    """``model``, checked: raises :class:`ArgumentTypeError` for anything but a module, as for its parameters, and
    :class:`UnsupportedError` for one that is replicated over other processes than those of the ``team``."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is {type(model).__name__}; expected the torch.nn.Module itself, whose forward passes are followed, "
            "not its parameters: KFAC(model), with params= for parameter groups, layer_collection= for some of them"
        )
    for module in model.modules():
        _require_team(module, team)
    return model


def require_team_now(team: Team = ALONE) -> None:
    """:func:`require_model` of what calls the model now: it may be replicated since the optimizer was made."""
    _require_team(DistributedDataParallel._get_active_ddp_module(), team)


def _require_team(module: Any, team: Team) -> None:
    size = module.process_group.size() if isinstance(module, DistributedDataParallel) else 1
    if size > 1 and team.size > 1 and Team.of(module.process_group) is not team:
        raise RankMismatchError(
            f"the model is replicated over a group of {size} processes, and process_group is another, of {team.size}; "
            "expected the same, process_group=model.process_group"
        )
    if size > 1 and team.size == 1:
        raise UnsupportedError(
            f"the model is replicated over {size} processes (DistributedDataParallel): gradients of single examples "
            "are those of this process, .grad is of all, and the replicas would drift apart without a word; pass "
            "process_group=model.process_group to the optimizer, or train in one process"
        )

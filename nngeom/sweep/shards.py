"""The processes over which a model under ``fully_shard`` is split, against those over which its examples are."""

from __future__ import annotations

from torch import nn

from nngeom.capture.gathered import ranks_of
from nngeom.core.errors import ArgumentError
from nngeom.ranks.team import Team


def require_ranks(model: nn.Module, team: Team) -> None:
    """Raise :class:`ArgumentError` unless all processes that hold parts of the model are in the team: they gather its
    parameters together.
    """
    ranks = ranks_of(model)
    missing = sorted(ranks - set(team.ranks))
    if len(ranks) > 1 and missing:
        given = f"{sorted(team.ranks)}" if team.size > 1 else "this process alone"
        raise ArgumentError(
            f"the model is sharded over {len(ranks)} ranks (fully_shard), of which {missing[:8]} are not in "
            f"process_group, {given}; expected a group of all of them: process_group=mesh.get_group(), for a mesh of "
            "several axes that of the flattened mesh, or torch.distributed.group.WORLD, in every process"
        )

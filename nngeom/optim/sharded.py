"""Models under ``fully_shard`` as an optimizer is given them: what is offered, and ``.grad`` in parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from nngeom.capture.gathered import gathered, ranks_of, sharded_modules
from nngeom.capture.remedies import require_whole
from nngeom.core.errors import RankMismatchError, UnsupportedError
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.ranks.team import Team
from nngeom.space.collection import LayerCollection
from nngeom.space.walk import named_modules
from nngeom.sweep.shards import require_ranks


def require_trainable(model: nn.Module, collection: LayerCollection, team: Team, **settings: Any) -> None:
    """Raise unless a sharded model is trained by the processes of the ``team``, all that hold parts of it and no
    others, with ``settings`` that go with that. Its parameters are in parts afterwards.
    """
    modules: list[Any] = sharded_modules(model)
    if not modules:
        return
    require_ranks(model, team)
    ranks = ranks_of(model)
    if team.size > 1 and set(team.ranks) != ranks:
        raise RankMismatchError(
            f"the model is sharded over the ranks {sorted(ranks)}, over which its gradients are averaged, and "
            f"process_group holds {sorted(team.ranks)}; expected the same"
        )
    for name, value in settings.items():
        if isinstance(value, LevenbergMarquardt) or (value and name != "damping"):
            raise UnsupportedError(
                f"{name}={value!r} of a model under fully_shard; expected a number or a damping object, passes inside "
                "of observe() or a closure, and another optimizer for parameters outside of the collection"
            )
    with gathered(model):
        require_whole(named_modules(model), collection.parameters(model), parts=False)
    for module in modules:
        module.reshard()

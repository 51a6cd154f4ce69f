"""The user's own forward and backward passes, watched: LayerJacobians of a training step without a pass of our own.

While the model runs, the recorder sees its uses of parameters; while the user's backward pass runs, the gradients of
those uses are read where they flow. The example axis and the structure of every use are settled by probing the model's
outputs, once for every graph (two small backward passes); after that an observed step costs no extra pass.
Nothing is left on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from nngeom.capture.current import require_converted_before, require_current
from nngeom.capture.gathered import sharded_modules
from nngeom.capture.network import Network
from nngeom.capture.recorder import Capture
from nngeom.core.given_plainly import require_callable
from nngeom.pullback.captured_pass import Pass
from nngeom.ranks.team import ALONE, Team
from nngeom.space.collection import LayerCollection, doors
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.sweep import Chunk


@dataclass
class Observation:
    """What was seen: the examples, and their rows in chunks (none when not recorded).

    ``positions``: of the outputs, those with a gradient, where they are counted; ``several``: whether outputs have more
    axes than examples and classes.
    """

    examples: int = 0
    positions: int = 0
    several: bool = False
    chunks: list[Chunk] = field(default_factory=list)


class Observer:
    """Watches a model train.

    With ``metric=None`` the rows are the gradients that the user's backward passes deliver, as they are (a loss
    averaged over the batch carries ``1/n``); with a metric, those of its cotangents, by one more backward pass.
    Parameters used in ways no adapter knows have no rows of single examples here: they get one row a batch
    (:attr:`batchwise`), the sum of its examples' rows, with random signs under a metric, so that its square is
    unbiased. ``team``: the processes that call the model together, each with its own examples. ``parts``: a model
    under ``fully_shard`` is kept whole while it is watched (:func:`~nngeom.capture.kept_whole.kept_whole`).
    """

    def __init__(
        self,
        model: nn.Module,
        collection: LayerCollection,
        cotangents: Cotangents | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
        part_of: Callable[[str], object] | None = None,
        team: Team = ALONE,
        *,
        parts: bool = False,
    ):
        self._exchanges = parts and bool(sharded_modules(model))
        network = Network.build(model, None, collection, parts=self._exchanges)
        self.network, self.doors = replace(network, distributed=None), doors(model)
        self.bare = self.doors == [model]  # nothing is around it, such as what copies a model to several devices
        self.network.registered  # noqa: B018  # now, before others are put into their place
        if outputs is not None:
            require_callable(outputs, "outputs")
        self.cotangents, self.pick, self.drawn = cotangents, outputs or default_outputs, 0
        self.part_of, self._left_to_fallback = part_of, set[str]()
        self.team = team
        self.watching: Callable[[], None] | None = None  # forgets what a block that the user opened has seen

    def require_current(self) -> None:
        """Raise :class:`CollectionError` where parameters of the model were exchanged or frozen: they would be missing
        from its steps, or a block divided; or have another dtype or device.
        """
        if not self._exchanges:
            require_current(self.network)
            require_converted_before(self.network)

    def leaves(self) -> Iterable[Tensor]:
        """What stands for the parameters while the model is watched."""
        if not self._exchanges:
            return self.network.parameters.values()
        named = dict(self.network.model.named_parameters(remove_duplicate=False))
        return [named[name] for name in self.network.parameters]

    @property
    def batchwise(self) -> set[str]:
        """Parameters that have one row a batch."""
        return self._left_to_fallback

    def resolve(self, capture: Capture, *, mixing: bool) -> Pass:
        """The blocks of a capture; compared with autograd unless a pass like it was."""
        run = Pass(self.network, capture, self._left_to_fallback, self.part_of)
        run.resolve(check=not mixing)
        if not mixing and not run.covered:
            run.prove(separate=False)
        return run

    def state(self) -> dict[str, Any]:
        """What decides how coming passes are seen, as plain values."""
        return {"drawn": self.drawn, "batchwise": sorted(self.batchwise)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.drawn = state["drawn"]
        self.batchwise.update(state["batchwise"])


def default_outputs(returned: Any) -> Any:
    """The outputs in what a model returns: a tensor, ``.logits``, or the first tensor with an axis in a tuple or
    mapping.
    """
    if isinstance(returned, Tensor):
        return returned
    logits = getattr(returned, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    items = (
        returned.values() if isinstance(returned, Mapping) else returned if isinstance(returned, (tuple, list)) else ()
    )
    return next((x for x in items if isinstance(x, Tensor) and x.ndim and x.requires_grad), returned)

"""The user's own forward and backward passes, watched: LayerJacobians of a training step without a pass of our own.

While the model runs, the recorder sees its uses of parameters; while the user's backward pass runs, the gradients of
those uses are read where they flow. The example axis and the structure of every use are settled by probing the model's
outputs, once for every graph (two small backward passes); after that an observed step costs no extra pass.
Nothing is left on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import Network
from nngeom.capture.recorder import Capture, Recorder
from nngeom.core.errors import ArgumentError, OutputError
from nngeom.pullback.captured_pass import Pass
from nngeom.space.collection import LayerCollection, unwrap
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.passage import Passage
from nngeom.sweep.sweep import Chunk


@dataclass
class Observation:
    """What was seen between entering and leaving: the examples, and their rows in chunks (none when not recorded)."""

    examples: int = 0
    chunks: list[Chunk] = field(default_factory=list)


class Observer:
    """Watches a model train.

    With ``metric=None`` the rows are the gradients that the user's backward passes deliver, as they are (a loss
    averaged over the batch carries ``1/n``); with a metric, those of its cotangents, by one more backward pass.
    Parameters used in ways no adapter knows have no rows of single examples here: they get one row a batch
    (:attr:`batchwise`), the sum of its examples' rows, with random signs under a metric, so that its square is
    unbiased.
    """

    def __init__(
        self,
        model: nn.Module,
        collection: LayerCollection,
        cotangents: Cotangents | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
        part_of: Callable[[str], object] | None = None,
    ):
        self.network = Network.build(model, None, collection)
        self.cotangents, self.pick, self.drawn = cotangents, outputs or default_outputs, 0
        self.part_of, self._left_to_fallback = part_of, set[str]()
        self._watching = False

    @property
    def batchwise(self) -> set[str]:
        """Parameters that have one row a batch."""
        return self._left_to_fallback

    def resolve(self, capture: Capture, *, mixing: bool) -> Pass:
        """The blocks of a capture; compared with autograd unless a pass like it was."""
        run = Pass(self.network, capture, self._left_to_fallback, self.part_of)
        run.resolve(check=not mixing)
        if not mixing and not run.proof.covers(run.capture):
            run.prove(separate=False)
        return run

    def state(self) -> dict[str, Any]:
        """What decides how coming passes are seen, as plain values."""
        return {"drawn": self.drawn, "batchwise": sorted(self.batchwise)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.drawn = state["drawn"]
        self.batchwise.update(state["batchwise"])

    @contextlib.contextmanager
    def watch(self, *, record: bool = True) -> Iterator[Observation]:
        """Watch what happens inside; the observation is complete on leaving. ``record=False`` counts examples only."""
        if self._watching:
            raise ArgumentError(
                "observe() was entered inside another observe() of the same optimizer; leave the first one before"
            )
        visit = _Visit(self, record=record)
        model = unwrap(self.network.model)
        handles = [
            model.register_forward_pre_hook(visit.enter, prepend=True),
            model.register_forward_hook(visit.leave, always_call=True),
        ]
        self._watching = True
        try:
            yield visit.observation
            visit.finish()
        finally:
            self._watching = False
            visit.close()
            for handle in handles:
                handle.remove()


class _Visit:
    def __init__(self, observer: Observer, *, record: bool) -> None:
        self.observer, self.record = observer, record
        self.observation = Observation()
        self.passages: list[Passage] = []
        self.depth, self.called = 0, False
        self.recorder: Recorder | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1
        if self.depth == 1 and self.record and torch.is_grad_enabled():
            self.recorder = Recorder(self.observer.network, refuse=False)
            self.recorder.__enter__()

    def leave(self, module: nn.Module, args: Any, returned: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)
        if returned is None or not torch.is_grad_enabled():
            return
        outputs = self.observer.pick(returned)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            given = "a single number" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise OutputError(
                f"the model returned {given}; expected outputs (n, ...), examples along the first axis: pass "
                "outputs=lambda returned: ..."
            )
        if not outputs.requires_grad:
            return
        self.called = True
        if recorder is None:
            self.observation.examples += outputs.shape[0]
            return
        capture = recorder.captured(outputs if outputs.ndim > 1 else outputs.unsqueeze(1))
        run, cotangents = self.observer.resolve(capture, mixing=recorder.mixing), self.observer.cotangents
        passage = Passage(self.observer.network, run, own_loss=cotangents is None)
        if cotangents is None:
            self.passages.append(passage)
            return
        self.observation.chunks += passage.measured(cotangents, self.observer.drawn)
        self.observation.examples += passage.n
        self.observer.drawn += passage.n

    def finish(self) -> None:
        """Rows from the gradients that have arrived."""
        if not self.called:
            raise ArgumentError(
                "the model was not called inside observe(), or not with gradients; expected its forward and "
                "backward pass there"
            )
        arrived = [p for p in self.passages if p.arrived]
        if self.passages and not arrived:
            raise ArgumentError(
                "no backward pass through the model happened inside observe(); expected loss.backward() before "
                "leaving it"
            )
        for passage in arrived:
            self.observation.chunks.append(passage.chunk(self.observation.examples))
            self.observation.examples += passage.n

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
        for passage in self.passages:
            passage.close()


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

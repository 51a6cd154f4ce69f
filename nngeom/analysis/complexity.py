"""The complexity of a trajectory: how far the parameters moved, weighed by how much the outputs feel it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nngeom.analysis.rows import squared_norms
from nngeom.core.given_plainly import require_whole
from nngeom.cotangents.loss import EveryOutput
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run


class ComplexityMeasure:
    """``C = sum_t |w_{t+1} - w_t| sqrt(tr K_t)`` with the tangent kernel ``K_t`` on the points of ``loader``.

    Call :meth:`update` after every optimiser step: the step actually taken counts, whatever the optimiser. The trace is
    taken before the step, anew every ``every`` steps and held between. Zero where nothing moves, additive over
    segments. ``value`` depends on the number ``examples`` of points as ``sqrt(examples)``; ``normalized`` is ``C / n``,
    the bound on the Rademacher complexity of what the steps can reach.

    The model is measured in evaluation mode and put back. Source: Baratin et al. 2021, eq. 18.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        every: int = 1,
        *,
        function: Function = None,
        layer_collection: LayerCollection | None = None,
        process_group: Any = None,
    ):
        require_whole(every, "every")
        run = Run.of(model, loader, function=function, layer_collection=layer_collection, process_group=process_group)
        agree(run, "ComplexityMeasure", every=every)
        with run.team.together("points"):
            self._run = run.held()
        self.model, self.every, self.steps = model, every, 0
        self.value = 0.0
        self.examples = 0
        self._weights = self._read()
        self._root = self._measure(check=True)

    @property
    def normalized(self) -> float:
        """``C / n``."""
        return self.value / self.examples

    def update(self) -> float:
        """Add the step made since the last call; returns its contribution."""
        weights = self._read()
        part = float((weights - self._weights).norm()) * self._root
        self._weights = weights
        self.value += part
        self.steps += 1
        if self.steps % self.every == 0:
            self._root = self._measure()
        return part

    def _read(self) -> Tensor:
        return PVector.from_model(self.model, self._run.network.collection).flat()

    def _measure(self, *, check: bool = False) -> float:
        with evaluating(self.model):
            norms = squared_norms(replace(self._run, check=check), EveryOutput())
        self.examples = len(norms)
        return float(norms.double().sum().sqrt())

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later with the same model and points."""
        return {"value": self.value, "steps": self.steps, "root": self._root, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state`` of :meth:`state_dict`."""
        self.value, self.steps, self._root = float(state["value"]), int(state["steps"]), float(state["root"])
        self._weights = state["weights"].to(self._weights)


class evaluating:
    """``with evaluating(model):`` every module in evaluation mode, each put back as it was."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> nn.Module:
        self._modes = [(m, m.training) for m in self.model.modules()]
        for m, _ in self._modes:
            m.training = False
        return self.model

    def __exit__(self, *error: object) -> None:
        for m, training in self._modes:
            m.training = training

"""What a tracker can measure: one function a quantity, from a look at the probe set to named numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.alignment import kernel_label_alignment
from nngeom.analysis.coherence import Coherence, coherence
from nngeom.analysis.geometric_complexity import geometric_complexity
from nngeom.analysis.kernel import center
from nngeom.analysis.labels import class_labels
from nngeom.analysis.rows import require_labels, wide_kernels
from nngeom.analysis.sharpness import non_uniformity, sharpness
from nngeom.analysis.spectrum import effective_rank, spectrum, trace_ratios
from nngeom.analysis.stiffness import stiffness
from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.causal import CausalLM
from nngeom.cotangents.loss import EveryOutput, as_loss
from nngeom.fmat.side import Side
from nngeom.mgs.metrics import kernel_metrics
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Function, Run

Numbers = dict[str, float]
QUANTITIES: dict[str, Callable[[Look], Numbers]] = {}


@dataclass
class Look:
    """The model on the probe set at one moment; what several quantities need is computed once.

    ``model``, ``batches``, ``loss``, ``function`` and ``layer_collection``: those of the :class:`Tracker`.
    """

    model: nn.Module
    batches: list[Any]
    loss: Any
    function: Function
    layer_collection: LayerCollection | None

    @functools.cached_property
    def run(self) -> Run:
        """The model on its batches, held."""
        return Run.of(self.model, self.batches, function=self.function, layer_collection=self.layer_collection).held()

    @functools.cached_property
    def labels(self) -> Tensor:
        """The targets."""
        return require_labels(self.run)

    @functools.cached_property
    def outputs(self) -> Tensor:
        """``(n, c)``."""
        return self.run.outputs()

    @functools.cached_property
    def kernels(self) -> dict[str, Tensor]:
        """``{layer: (c, n, c, n)}``, in float64."""
        with torch.no_grad():
            return wide_kernels(Side.of(self.run, EveryOutput()), by_layer=True)

    @functools.cached_property
    def kernel(self) -> Tensor:
        """``(c, n, c, n)``: their sum."""
        return torch.stack(list(self.kernels.values())).sum(0)

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """Of the centred kernel, descending."""
        return spectrum(center(self.kernel))

    @functools.cached_property
    def coherence(self) -> Coherence:
        """Of the gradients of the examples' losses."""
        return coherence(
            self.model, self.run.loader, self.loss, function=self.function, layer_collection=self.layer_collection
        )


def quantity(name: str) -> Callable[[Callable[[Look], Numbers]], Callable[[Look], Numbers]]:
    """Register a function ``look -> {column: number}`` under a name for ``Tracker(metrics=[name, ...])``."""

    def register(f: Callable[[Look], Numbers]) -> Callable[[Look], Numbers]:
        QUANTITIES[name] = f
        return f

    return register


@quantity("loss")
def _loss(look: Look) -> Numbers:
    with torch.no_grad():
        return {"probe_loss": float(as_loss(look.loss, look.model)(look.outputs, look.labels).mean())}


@quantity("accuracy")
def _accuracy(look: Look) -> Numbers:
    return {"probe_accuracy": accuracy(look.outputs, look.labels, as_loss(look.loss))}


def accuracy(outputs: Tensor, targets: Tensor, loss: Any) -> float:
    """The share of right labels, over positions too, but for ignored ones; NaN where the targets are no class labels.

    With one output an example the sign is the guess, for labels 0 and 1 or -1 and 1.
    """
    labels = class_labels(targets) if targets.ndim < 2 or targets.numel() == len(targets) else targets
    if labels is None or labels.is_floating_point():
        return math.nan
    if outputs[0].numel() == 1:
        binary = labels.numel() == len(outputs) and not bool((labels.abs() > 1).any())
        return float(((outputs.flatten() > 0) == (labels.flatten() > 0)).double().mean()) if binary else math.nan
    categorical = getattr(loss, "categorical", None) or Categorical()
    labels = loss.aligned(outputs, labels) if isinstance(loss, CausalLM) else labels
    fitted = categorical.fit(outputs, labels)
    guess, truth = fitted.rows(outputs).argmax(-1), fitted.labels(outputs, labels)
    if truth is None:
        return math.nan
    return float((guess == truth.to(guess.device))[(truth != fitted.ignore_index).to(guess.device)].double().mean())


@quantity("spectrum")
def _spectrum(look: Look) -> Numbers:
    values = look.eigenvalues
    ranks = [r for r in (1, 2, 5, 10, 20, 50, 100) if r <= len(values)]
    return {f"eigenvalue_{r}": float(values[r - 1]) for r in ranks}


@quantity("effective_rank")
def _effective_rank(look: Look) -> Numbers:
    return {"effective_rank": float(effective_rank(look.eigenvalues))}


@quantity("trace_ratios")
def _trace_ratios(look: Look) -> Numbers:
    ks = [10, 40, 80]
    return {f"trace_ratio_{k}": float(t) for k, t in zip(ks, trace_ratios(look.eigenvalues, ks))}


@quantity("alignment")
def _alignment(look: Look) -> Numbers:
    return {"alignment": float(kernel_label_alignment(look.kernel, look.labels, shape=look.outputs.shape[1:]))}


@quantity("alignment_by_layer")
def _alignment_by_layer(look: Look) -> Numbers:
    of = lambda k: float(kernel_label_alignment(k, look.labels, shape=look.outputs.shape[1:]))
    return {f"alignment/{layer}": of(k) for layer, k in look.kernels.items()}


@quantity("mgs")
def _mgs(look: Look) -> Numbers:
    c, n = look.kernel.shape[:2]
    m = kernel_metrics(look.kernel.reshape(c * n, c * n), rows=look.outputs.dtype)
    return {"mgs_trace": float(m.mean_trace), "mgs_logdet": float(m.mean_log), "mgs_cosine": float(m.cosine)}


@quantity("coherence")
def _coherence(look: Look) -> Numbers:
    return {"coherence": float(look.coherence.alpha), "coherence_ratio": float(look.coherence.ratio)}


@quantity("noise_scale")
def _noise_scale(look: Look) -> Numbers:
    """The trace of the covariance of per-example gradients over the square of their mean, on the probe set
    (McCandlish et al. 2018, the simple noise scale).
    """
    alpha = float(look.coherence.alpha)
    return {"noise_scale": 1 / alpha - 1 if alpha != 0 else math.inf}


@quantity("stiffness")
def _stiffness(look: Look) -> Numbers:
    measured = stiffness(
        look.model, look.run.loader, loss=look.loss, function=look.function, layer_collection=look.layer_collection
    )
    within, between = (measured.within, measured.between) if measured.has_classes else (math.nan, math.nan)
    return {"stiffness": float(measured.mean), "stiffness_within": float(within), "stiffness_between": float(between)}


@quantity("geometric_complexity")
def _geometric_complexity(look: Look) -> Numbers:
    return {"geometric_complexity": float(geometric_complexity(look.model, look.run.loader, function=look.function))}


@quantity("sharpness")
def _sharpness(look: Look) -> Numbers:
    return {
        "sharpness": float(
            sharpness(
                look.model,
                look.run.loader,
                look.loss,
                function=look.function,
                layer_collection=look.layer_collection,
            )
        )
    }


@quantity("non_uniformity")
def _non_uniformity(look: Look) -> Numbers:
    measured = non_uniformity(
        look.model, look.run.loader, look.loss, function=look.function, layer_collection=look.layer_collection
    )
    return {"non_uniformity": float(measured)}


@quantity("parameter_norm")
def _parameter_norm(look: Look) -> Numbers:
    squares = [p.detach().double().square().sum() for p in look.run.network.parameters.values()]
    return {"parameter_norm": float(torch.stack(squares).sum().sqrt())}

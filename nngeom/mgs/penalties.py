"""Differentiable penalties on the kernel of model gradients: scalars to add to a loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.batch import one_batch, with_input_gradients
from nngeom.capture.fused import twice_differentiable
from nngeom.capture.network import gradients_on
from nngeom.capture.recorded import Recorded
from nngeom.capture.recorder import Capture, record
from nngeom.capture.remedies import gradients
from nngeom.core.contract import squared_lengths
from nngeom.core.draws import factors, outer
from nngeom.core.errors import ArgumentError, CoverageError
from nngeom.core.given_plainly import require_real, require_whole
from nngeom.cotangents.loss import EveryOutput, as_loss, judged
from nngeom.fmat.estimate import RandomSigns
from nngeom.measures.kernels import GramMatrix
from nngeom.pullback.axes import ExampleAxis
from nngeom.solve.hutchinson import rademacher
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy, Sweep

Function = Any


ALIVE = Policy(keep_graph=True)


def trace_penalty(
    model: nn.Module,
    inputs: Any,
    estimator: str = "exact",
    reduction: str = "sum",
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    return_outputs: bool = False,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Any:
    """``tr K = sum_i sum_y |d f_y(x_i) / d w|^2`` of one batch, with its graph: add ``strength * trace_penalty(...)``
    to a loss.

    ``estimator="exact"``: by squared norms of the factored rows, one double backward an output. ``"rademacher"``:
    ``|d/dw sum_iy e_iy f_y(x_i)|^2`` with random signs, unbiased, one double backward for each of ``samples``, drawn by
    ``generator`` (torch's global one by default); linear layers without positions contribute the sum over examples
    ``i`` of that of each, which scatters less. ``reduction="sum"`` is the trace of the batch kernel, as in the paper;
    ``"mean"`` divides by the batch size. ``inputs``: what the model takes, or a batch. ``return_outputs``: also the
    outputs, with their graph: a loss computed from them shares the forward and backward pass.

    Zero gradient where the model is linear in its parameters. Raises :class:`ModeError` for training-mode batch
    normalisation or dropout. Source: Szolnoky et al. 2022, Model Gradient Similarity, section on the trace.
    """
    require_reduction(reduction)
    if estimator not in ("exact", "rademacher"):
        raise ArgumentError(f"estimator is {estimator!r}; expected 'exact' or 'rademacher'")
    require_whole(samples, "samples")
    run = Run.of(model, one_batch(inputs), function=function, layer_collection=layer_collection)
    capture = record(run.network, next(run.batches()), keep_graph=True)
    f = capture.outputs
    if not f.requires_grad:
        raise CoverageError(
            "the outputs do not depend on any selected parameter (torch.no_grad or .detach() inside the model?)"
        )
    with gradients_on():
        if estimator == "exact":
            total = _trace(run, capture)
        else:
            total = _squared_sums(run, capture, rademacher(samples, *f.shape, like=f, generator=generator)) / samples
    value = total if reduction == "sum" else total / f.shape[0]
    return (value, f) if return_outputs else value


def logdet_penalty(
    model: nn.Module,
    inputs: Any,
    jitter: float = 0.1,
    reduction: str = "sum",
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Tensor:
    """``log det(K + jitter I)`` of one batch, with its graph; ``reduction="mean"`` divides by the number of
    eigenvalues.

    ``inputs``: what the model takes, or a batch. ``K`` is ``(n c, n c)``: meant for small batches. Unbounded below as
    ``jitter`` goes to 0: a small jitter or a large strength collapses the network to a constant (on two circles 1e-6
    does at strength 0.01, 0.1 works at 0.03), hence the default. Raises :class:`ArgumentError` for a jitter that is not
    positive. Source: Szolnoky et al. 2022, section on the determinant.
    """
    require_reduction(reduction)
    require_real(jitter, "jitter")
    if not jitter > 0:
        raise ArgumentError(f"jitter is {jitter}; expected a positive number: the kernel may be singular")
    batch = one_batch(inputs)
    kernel = GramMatrix(model, batch, function=function, layer_collection=layer_collection, differentiable=True)
    value = kernel.logdet(jitter)
    return value if reduction == "sum" else value / kernel.shape[0]


def loss_gradient_penalty(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    wrt: str = "parameters",
    loss: Any = "cross_entropy",
    *,
    squared: bool = False,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Tensor:
    """``|d L / d w|`` or, with ``wrt="inputs"``, ``|d L / d x|`` of the batch's mean loss ``L``, with its graph.

    ``inputs``, ``targets``: of the batch; ``loss``: as for :func:`nngeom.EmpiricalFIM`. ``squared``: the square,
    smoother at zero (flatness regularisation; double back-propagation). At a stationary point the gradient of the norm
    is taken as 0. Never above ``sqrt(tr K) |d L / d f|``.

    Raises :class:`ArgumentError` for another ``wrt``. Source: Szolnoky et al. 2022, appendix A; Drucker and Le Cun
    1992.
    """
    if wrt not in ("parameters", "inputs"):
        raise ArgumentError(f"wrt is {wrt!r}; expected 'parameters' or 'inputs'")
    batch = {**inputs, "labels": targets} if isinstance(inputs, dict) else (inputs, targets)
    run = Run.of(model, [batch], function=function, layer_collection=layer_collection)
    network, batch = run.network, next(run.batches())
    variables = list(network.parameters.values())
    if wrt == "inputs":
        batch, variables = with_input_gradients(batch)  # type: ignore[assignment]
    with gradients_on(), twice_differentiable():
        outputs = network.run(batch)
        measured, moved = judged(as_loss(loss, model), outputs, batch)
        value = measured.precisely(outputs, moved).mean()
        grads = gradients(value, variables, None, create_graph=True)
        square = sum((g.square().sum() for g in grads if g is not None), start=value.new_zeros(()))
        if squared:
            return square
        live = square != 0  # NaN stays NaN
        return torch.where(live, torch.where(live, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square))


def _trace(run: Run, capture: Capture) -> Tensor:
    """``sum_kn |J[k, n]|^2``."""
    sweep = Sweep(run, EveryOutput(), ALIVE)
    norms = [j.squared_norms().sum() for chunk in sweep.cut(capture) for j in chunk.jacobians.values()]
    return torch.stack(norms).sum()


def _squared_sums(run: Run, capture: Capture, signs: Tensor) -> Tensor:
    """Summed over ``signs [k, n, *out]``: squared gradients of every example by itself where a layer has one row for
    each, and of all examples together elsewhere. Both have the trace as their mean; the first scatters less and costs
    less.
    """
    single = _with_a_row_an_example(run, capture)
    covered = {slot.name for recorded in single for slot in recorded.use.slots}
    others = [p for name, p in run.network.parameters.items() if name not in covered]
    lengths = [squared_lengths(r.read_inputs().flatten(1)) + (r.use.bias is not None) for r in single]
    total = capture.outputs.new_zeros(())
    for v in signs:
        variables: list[Any] = [*(recorded.edge for recorded in single), *others]
        grads = gradients(capture.outputs, variables, v, create_graph=True)
        for length, g in zip(lengths, grads):
            if g is not None:
                total = total + torch.dot(squared_lengths(g), length)
        total = total + sum(g.square().sum() for g in grads[len(single) :] if g is not None)
    return total


def _with_a_row_an_example(run: Run, capture: Capture) -> list[Recorded]:
    """Uses of a whole matrix (and its bias) that are its only ones, proved to have row ``n`` from example ``n``
    alone.
    """
    n, times = capture.outputs.shape[0], Counter(slot.name for recorded in capture.uses for slot in recorded.use.slots)
    fitting = []
    for recorded in capture.uses:
        use = recorded.use
        if (
            not use.product
            or use.weight is None
            or use.lead != (n,)
            or any(times[s.name] > 1 or s.name in capture.unstructured for s in use.slots)
        ):
            continue
        width = recorded.shape[-1]
        whole = use.weight.arrangement.sizes == (1, width, use.weight.arrangement.sizes[2]) and not use.weight.column
        whole = whole and tuple(recorded.shape) == (n, width)
        whole = whole and (use.bias is None or use.bias.arrangement.sizes == (1, width, 1))
        if whole:
            fitting.append(recorded)
    fitting = _as_they_are(fitting, n, capture.outputs.detach())
    if not fitting:
        return []
    proof = Sweep(run, RandomSigns(samples=1, seed=0, shared=False), ALIVE).proved(capture)
    return [
        recorded
        for recorded in fitting
        if isinstance(proof.place(recorded.place), ExampleAxis)
        and proof.left.isdisjoint(slot.name for slot in recorded.use.slots)
    ]


def _as_they_are(uses: list[Recorded], n: int, like: Tensor) -> list[Recorded]:
    """The uses whose rows' gradients are those of their outputs ``[n, width]`` as they are, which ``product`` promises:
    asked of random ones, drawn once, the first columns of the same for all.
    """
    widest = max((recorded.shape[-1] for recorded in uses), default=0)
    drawn = outer(factors((1, n, widest), torch.Generator().manual_seed(0), like))
    asked = ((recorded, drawn[..., : recorded.shape[-1]].contiguous()) for recorded in uses)
    return [recorded for recorded, g in asked if torch.equal(recorded.use.gradients(g).flatten(), g.flatten())]


def require_reduction(reduction: str) -> None:
    """Raise :class:`ArgumentError` for an unknown reduction."""
    if reduction not in ("sum", "mean"):
        raise ArgumentError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")

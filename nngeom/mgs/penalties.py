"""Differentiable penalties on the kernel of model gradients: scalars to add to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, CoverageError
from nngeom.generator.capture import capture
from nngeom.generator.sweep import Sweep
from nngeom.generator.task import Task, gradients_on
from nngeom.metrics.loss import IdentityMetric, as_loss
from nngeom.pmat.implicit import math_attention
from nngeom.solve.hutchinson import rademacher
from nngeom.space.collection import LayerCollection

Function = Any


def trace_penalty(
    model: nn.Module,
    inputs: Any,
    estimator: str = "exact",
    reduction: str = "sum",
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Tensor:
    """``tr K = sum_i sum_y |d f_y(x_i) / d w|^2`` of one batch, with its graph: add ``strength * trace_penalty(...)`` to a loss.

    ``estimator="exact"``: by squared norms of the factored rows, one double backward an output. ``"rademacher"``:
    ``|d/dw sum_iy e_iy f_y(x_i)|^2`` with random signs, unbiased, one double backward a sample. ``reduction="sum"`` is the trace
    of the batch kernel, as in the paper; ``"mean"`` divides by the batch size. ``inputs``: what the model takes, or a batch.

    Zero gradient where the model is linear in its parameters. Raises :class:`ModeError` for training-mode batch
    normalisation or dropout. Source: Szolnoky et al. 2022, Model Gradient Similarity, section on the trace.
    """
    require_reduction(reduction)
    task = Task.build(model, function, layer_collection)
    batch = _one(task, inputs)
    if estimator == "exact":
        total, n = _exact_trace(task, batch)
    elif estimator == "rademacher":
        total, n = _random_trace(task, batch, samples, generator)
    else:
        raise ArgumentError(f"estimator is {estimator!r}; expected 'exact' or 'rademacher'")
    return total if reduction == "sum" else total / n


def logdet_penalty(
    model: nn.Module,
    inputs: Any,
    jitter: float = 0.1,
    reduction: str = "sum",
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Tensor:
    """``log det(K + jitter I)`` of one batch, with its graph; ``reduction="mean"`` divides by the number of eigenvalues.

    ``K`` is ``(n c, n c)``: meant for small batches. Unbounded below as ``jitter`` goes to 0: a small jitter or a large strength
    collapses the network to a constant (on two circles 1e-6 does at strength 0.01, 0.1 works at 0.03), hence the default.
    Raises :class:`ArgumentError` for a jitter that is not positive. Source: Szolnoky et al. 2022, section on the determinant.
    """
    require_reduction(reduction)
    if not jitter > 0:
        raise ArgumentError(f"jitter is {jitter}; expected a positive number: the kernel may be singular")
    task = Task.build(model, function, layer_collection)
    k = batch_kernel(task, _one(task, inputs))
    value = 2 * torch.linalg.cholesky(k + jitter * torch.eye(len(k), dtype=k.dtype, device=k.device)).diagonal().log().sum()
    return value if reduction == "sum" else value / len(k)


def loss_gradient_penalty(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    wrt: str = "parameters",
    loss: Any = "cross_entropy",
    squared: bool = False,
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
) -> Tensor:
    """``|d L / d w|`` or, with ``wrt="inputs"``, ``|d L / d x|`` of the batch's mean loss ``L``, with its graph.

    ``squared``: the square, smoother at zero (flatness regularisation; double back-propagation). At a stationary point
    the gradient of the norm is taken as 0. Never above ``sqrt(tr K) |d L / d f|``.

    Raises :class:`ArgumentError` for another ``wrt``. Source: Szolnoky et al. 2022, appendix A; Drucker and Le Cun 1992.
    """
    if wrt not in ("parameters", "inputs"):
        raise ArgumentError(f"wrt is {wrt!r}; expected 'parameters' or 'inputs'")
    from nngeom.analysis.geometric_complexity import with_input_gradients

    task = Task.build(model, function, layer_collection)
    batch = {**inputs, "labels": targets} if isinstance(inputs, dict) else (inputs, targets)
    batch = next(task.batches([batch]))
    variables = list(task.parameters.values())
    if wrt == "inputs":
        batch, variables = with_input_gradients(batch)  # type: ignore[assignment]
    moved = batch["labels"] if isinstance(batch, dict) else batch[1]
    with gradients_on(), math_attention():
        value = as_loss(loss)(task.run(batch), moved).mean()
        grads = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
        square = sum((g.square().sum() for g in grads if g is not None), start=value.new_zeros(()))
        if squared:
            return square
        live = square > 0
        return torch.where(live, torch.where(live, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square))


def batch_kernel(task: Task, batch: Any, graph: bool = True) -> Tensor:
    """``(c n, c n)``: the kernel of one batch, rows ``output * n + example``."""
    with math_attention():
        chunks = list(_sweep(task, batch, graph).chunks())
        rows = []
        for x in chunks:
            columns = [sum(x.jacobians[layout].gram(y.jacobians[layout]) for layout in x.jacobians) for y in chunks]
            rows.append(torch.cat(columns, 2))
        k = torch.cat(rows, 0)
    c, n = k.shape[:2]
    m = k.reshape(c * n, c * n)
    return (m + m.T) / 2


def _sweep(task: Task, batch: Any, graph: bool) -> Sweep:
    return Sweep(task, [batch], IdentityMetric(), check=False, keep_graph=graph)


def _exact_trace(task: Task, batch: Any) -> tuple[Tensor, int]:
    total: Any = 0.0
    with math_attention():
        for chunk in _sweep(task, batch, True).chunks():
            total, n = total + sum(j.squared_norms().sum() for j in chunk.jacobians.values()), chunk.examples
    return total, n


def _random_trace(task: Task, batch: Any, samples: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
    if samples < 1:
        raise ArgumentError(f"samples is {samples}; expected a whole number of at least 1")
    with gradients_on(), math_attention():
        outputs = capture(task, batch).outputs
        if not outputs.requires_grad:
            raise CoverageError("the outputs do not depend on any selected parameter (torch.no_grad or .detach() inside the model?)")
        total = outputs.new_zeros(())
        parameters = list(task.parameters.values())
        for _ in range(samples):
            signs = rademacher(*outputs.shape, like=outputs, generator=generator)
            grads = torch.autograd.grad(outputs, parameters, signs, create_graph=True, allow_unused=True)
            total = total + sum(g.square().sum() for g in grads if g is not None)
    return total / samples, outputs.shape[0]


def _one(task: Task, inputs: Any) -> Any:
    return next(task.batches([inputs]))


def require_reduction(reduction: str) -> None:
    """Raise :class:`ArgumentError` for an unknown reduction."""
    if reduction not in ("sum", "mean"):
        raise ArgumentError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")

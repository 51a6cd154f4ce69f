"""Scores of single inputs by the size of their model gradients, and the attacks they are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.rows import squared_norms
from nngeom.capture.network import gradients_on
from nngeom.core.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from nngeom.core.given_plainly import described, require_at_least, require_real_tensor, require_whole
from nngeom.cotangents.fisher import ExactFisher, as_likelihood
from nngeom.cotangents.loss import EveryOutput, as_loss
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run


def sample_trace(
    model: nn.Module,
    inputs: Any,
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Tensor:
    """``(n,)``: ``sum_y |d f_y(x_i) / d w|^2``, the trace of each input's own kernel block.

    Large for confident adversarial inputs (and for plain noise); near a decision boundary see
    :func:`sample_fisher_trace`. ``inputs``: one batch, or an iterable of batches. Source: Szolnoky et al. 2022,
    appendix C.
    """
    run = Run.of(
        model,
        inputs,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    agree(run, "sample_trace")
    return squared_norms(run, EveryOutput())


def sample_fisher_trace(
    model: nn.Module,
    inputs: Any,
    likelihood: Any = "categorical",
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Tensor:
    """``(n,)``: ``sum_y p_y |d log p_y(x_i) / d w|^2``, the trace of each input's own Fisher matrix.

    ``inputs``: what the model takes, or a batch; ``likelihood``: as for :func:`nngeom.FIM`. Large near the decision
    boundary, small for confident inputs. Source: Martin and Elster 2019.
    """
    cotangents = ExactFisher(as_likelihood(likelihood, model))
    run = Run.of(
        model,
        inputs,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    agree(run, "sample_fisher_trace", metric=cotangents)
    return squared_norms(run, cotangents)


def fgsm(model: nn.Module, inputs: Tensor, targets: Tensor, epsilon: float, loss: Any = "cross_entropy") -> Tensor:
    """``inputs`` moved by ``epsilon`` along the sign of the gradient of ``loss`` at ``targets`` (Goodfellow et al.
    2015).
    """
    require_at_least(epsilon, "epsilon")
    return inputs + epsilon * _ascent(model, inputs, targets, loss).sign()


def pgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int = 20,
    rate: float | None = None,
    loss: Any = "cross_entropy",
) -> Tensor:
    """Projected sign ascent of ``loss`` at ``targets`` within ``|x' - x|_inf <= epsilon`` of the ``inputs`` ``x``
    (Madry et al. 2018).

    ``steps``, each of size ``rate``: ``2.5 epsilon / steps`` by default.
    """
    require_at_least(epsilon, "epsilon")
    require_whole(steps, "steps")
    rate = 2.5 * epsilon / steps if rate is None else rate
    require_at_least(rate, "rate")
    x = inputs
    for _ in range(steps):
        x = inputs + (x + rate * _ascent(model, x, targets, loss).sign() - inputs).clamp(-epsilon, epsilon)
    return x


def auroc(negatives: Tensor, positives: Tensor) -> float:
    """The probability that one of ``positives`` scores above one of ``negatives``, ties counted by half.

    Raises :class:`ArgumentError` where a side is empty, :class:`NonFiniteError` on NaN.
    """
    for x in (negatives, positives):
        if not isinstance(x, Tensor) or x.ndim != 1 or x.is_complex():
            raise ArgumentTypeError(f"scores are {described(x)}; expected tensors (n,), one an input")
    if not negatives.numel() or not positives.numel():
        raise ArgumentError(
            f"got {negatives.numel()} negatives and {positives.numel()} positives; expected at least one of each"
        )
    if bool(negatives.isnan().any() | positives.isnan().any()):
        raise NonFiniteError(
            "scores contain NaN, which is neither above nor below another; check the inputs and the model"
        )
    order = positives[:, None] - negatives[None, :]
    return float((order > 0).double().mean() + 0.5 * (order == 0).double().mean())


def _ascent(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> Tensor:
    require_real_tensor(inputs, "inputs")
    if not inputs.is_floating_point():
        raise ArgumentTypeError(f"inputs are {described(inputs)}; expected floating-point numbers, to be moved")
    with gradients_on():
        x = inputs.detach().clone().requires_grad_()
        (ascent,) = torch.autograd.grad(as_loss(loss, model)(model(x), targets).sum(), x)
    if not bool(torch.isfinite(ascent).all()):
        raise NonFiniteError("the gradient in the inputs contains NaN or infinity; check the inputs and the model")
    return ascent

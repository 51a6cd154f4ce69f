"""Eigenfunctions of the tangent kernel, on a sample and off it, and what a gradient step does to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.kernel import fix_signs, kernel_tensor, require_symmetric
from nngeom.analysis.rows import all_labels
from nngeom.analysis.spectrum import THRESHOLD
from nngeom.capture.network import gradients_on
from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, SingularError
from nngeom.core.given_plainly import require_at_least, require_real_tensor, require_whole
from nngeom.cotangents.loss import as_loss
from nngeom.measures.kernels import GramMatrix
from nngeom.ranks.made import made
from nngeom.ranks.team import Team
from nngeom.ranks.totals import gathered, totals
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run


@dataclass(frozen=True)
class Eigenfunctions:
    """``eigenvalues`` ``(k,)``, descending, of ``K`` (not divided by ``n``), and ``functions`` ``(k, c, n)`` on the
    points asked for.

    On the sample the functions are orthonormal for ``sum_i`` and are eigenvectors of ``K``; elsewhere they are their
    Nystrom extensions. Signs: the entry of largest modulus *on the sample* is positive. ``sample``: the same on the
    sample.
    """

    eigenvalues: Tensor
    functions: Tensor
    sample: Tensor


def eigenfunctions(
    model: nn.Module,
    grid: Any,
    k: int = 6,
    *,
    at: Any = None,
    centered: bool = False,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Eigenfunctions:
    """The ``k`` leading eigenvalues and eigenfunctions of the tangent kernel sampled on ``grid``, evaluated there or at
    ``at``.

    ``u_J(x) = sum_i K(x, x_i) u_J(x_i) / lambda_J``. ``grid`` and ``at`` are loaders or batches. ``centered``: features
    less their mean over ``grid``, output by output; at initialisation the uncentred kernel hides everything behind its
    first eigenvalue. With a ``process_group`` both are split over processes, and all have the functions of all points.
    Raises :class:`ArgumentError` for ``k`` out of range, :class:`SingularError` where one of the
    ``k`` eigenvalues is zero and an extension is asked for. Source: Baratin et al. 2021, eq. 3 and 47.
    """
    options: dict[str, Any] = {
        "function": function,
        "layer_collection": layer_collection,
        "centered": centered,
        "memory_budget": memory_budget,
        "check": check,
        "process_group": process_group,
    }
    run = Run.of(model, grid, function=function, layer_collection=layer_collection, process_group=process_group)
    agree(run, "eigenfunctions", k=k, at=at is not None)
    with run.team.together("batches"):
        grid = run.held().loader
    kernel = GramMatrix(model, grid, **options)
    values, vectors = _leading(require_symmetric(kernel), k, run.team)
    sample = vectors.T.reshape(k, kernel.outputs, kernel.rows)
    if at is None:
        return Eigenfunctions(values, sample, sample)
    if bool(values[-1] <= THRESHOLD * values[0]):
        raise SingularError(
            f"eigenvalue {k} of the kernel is zero ({float(values[-1]):.3g}); its function has no extension: use "
            "a smaller k"
        )
    cross = GramMatrix(model, grid, other=at, **options).tensor
    return Eigenfunctions(values, torch.einsum("kcn,cndm->kdm", sample, cross) / values[:, None, None], sample)


@dataclass(frozen=True)
class StepModes:
    """A gradient step seen in the eigenbasis of the kernel: one entry a mode, ``eigenvalues`` ``(k,)`` descending.

    ``predicted``: ``-lr lambda_J u_J^T dL/df``, to first order in ``lr``; ``actual``: the change of the outputs
    projected on ``u_J``; ``residual``: what the first order misses, ``|df - predicted| / |df|``. ``functions`` ``(k, c,
    n)``. ``change`` and ``predicted_change``: the changes of the outputs themselves ``(c, n)``; ``elsewhere``,
    ``predicted_elsewhere``: at other points.
    """

    eigenvalues: Tensor
    functions: Tensor
    predicted: Tensor
    actual: Tensor
    residual: Tensor
    change: Tensor
    predicted_change: Tensor
    elsewhere: Tensor | None = None
    predicted_elsewhere: Tensor | None = None


def step_modes(
    model: nn.Module,
    loader: Any,
    lr: float,
    loss: Any = "cross_entropy",
    k: int | None = None,
    *,
    at: Any = None,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> StepModes:
    """What a step ``-lr dL/dw`` on the mean loss of ``loader`` does to the outputs, mode by mode: the local spectral
    bias.

    The parameters are moved, the outputs read, and the parameters put back exactly. ``lr``: the learning rate;
    ``loss``: as for :func:`nngeom.EmpiricalFIM`. ``k``: that many leading modes (all by default). ``at``: a second
    loader, where the change is predicted by Nystrom extension, ``-lr K(x, .) dL/df``. With a ``process_group`` the mean
    is over the examples of all processes.

    Source: Baratin et al. 2021, lemma 1 and propositions 5 and 6.
    """
    options: dict[str, Any] = {
        "function": function,
        "layer_collection": layer_collection,
        "memory_budget": memory_budget,
        "check": check,
        "process_group": process_group,
    }
    require_at_least(lr, "lr", above=True)
    run = Run.of(model, loader, function=function, layer_collection=layer_collection, process_group=process_group)
    agree(run, "step_modes", lr=lr, loss=loss, k=k, at=at is not None)
    with run.team.together("batches"):
        run = run.held()
        other = None if at is None else run.on(at).held()
    y = all_labels(run)
    kernel = GramMatrix(model, run.loader, **options)
    count = kernel.outputs * kernel.rows if k is None else k
    values, vectors = _leading(require_symmetric(kernel), count, run.team)
    before = _outputs(run)
    with gradients_on():
        f = before.detach().requires_grad_()
        gradient = torch.autograd.grad(as_loss(loss, model)(f, y).mean(), f)[0]
    pulled = _columns(gradient)
    weights = PVector.from_model(model, run.network.collection)
    elsewhere = None if other is None else _outputs(other)
    step = _pull_back(run, gradient)
    try:
        (weights - lr * step).copy_to(model)
        change = _columns(_outputs(run) - before)
        moved = None if other is None or elsewhere is None else _columns(_outputs(other) - elsewhere)
    finally:
        weights.copy_to(model)
    predicted = -lr * values * (vectors.T @ pulled.flatten())
    expected = -lr * torch.einsum("cn,cndm->dm", pulled, kernel.tensor)
    cross = (
        None
        if at is None
        else -lr * torch.einsum("cn,cndm->dm", pulled, GramMatrix(model, run.loader, other=at, **options).tensor)
    )
    residual = (change - expected).norm() / change.norm()
    functions = vectors.T.reshape(count, kernel.outputs, kernel.rows)
    return StepModes(
        eigenvalues=values,
        functions=functions,
        predicted=predicted,
        actual=vectors.T @ change.flatten(),
        residual=residual,
        change=change,
        predicted_change=expected,
        elsewhere=moved,
        predicted_elsewhere=cross,
    )


def linear_dynamics(K: Any, start: Tensor, targets: Tensor, lr: float, steps: int) -> Tensor:
    """``f_t = y + (I - lr K)^t (f_0 - y)``: outputs ``(c, n)`` after gradient descent on ``1/2 |f - y|^2`` with a fixed
    kernel.

    ``start``: the outputs ``f_0 (c, n)``; ``targets``: ``y (c, n)``; ``steps``: ``t``, each with learning rate ``lr``.
    """
    m, shape = require_symmetric(K), tuple(kernel_tensor(K).shape[:2])
    for x, what in ((start, "start"), (targets, "targets")):
        require_real_tensor(x, what)
        if tuple(x.shape) != shape:
            raise ArgumentError(f"{what} is {tuple(x.shape)}; expected outputs {shape}")
    require_at_least(lr, "lr")
    require_whole(steps, "steps", 0)
    values, vectors = linalg.eigh(m)
    residual = vectors.T @ (start - targets).to(m).flatten()
    return targets.to(m) + (vectors @ ((1 - lr * values) ** steps * residual)).view(start.shape)


def _leading(m: Tensor, k: int, team: Team) -> tuple[Tensor, Tensor]:
    require_whole(k, "k")
    if k > len(m):
        raise ArgumentError(f"k is {k}; expected between 1 and {len(m)}, the size of the kernel")
    values, vectors = made(team, "eigenvectors", {"kernel": 1.0}, lambda _: linalg.eigh(m), m.device)["kernel"]
    return values[-k:].flip(0).clamp_min(0), fix_signs(vectors[:, -k:].flip(1)).contiguous()


def _outputs(run: Run) -> Tensor:
    """The outputs of all examples, of all processes."""
    return gathered(run.team, "outputs", lambda: run.outputs() if run.loader else None, run.network.device)


def _columns(outputs: Tensor) -> Tensor:
    """``(n, *shape) -> (c, n)``."""
    return outputs.flatten(1).T


def _pull_back(run: Run, gradient: Tensor) -> PVector:
    """``sum_i J_i^T g_i`` over the examples of all processes, one backward pass a batch."""
    parameters = list(run.network.parameters.values())
    start = sum(run.team.exchange("examples", sum(run.sizes))[: run.team.rank])

    def own() -> tuple[list[Tensor], int]:
        at, total = start, torch.cat([torch.zeros_like(p).flatten() for p in parameters])
        for batch in run.loader:
            with gradients_on():
                outputs = run.network.run(batch)
                grads = torch.autograd.grad(outputs, parameters, gradient[at : at + len(outputs)], allow_unused=True)
            at += len(outputs)
            total += torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)])
        return [total.detach()], at - start

    return PVector(run.network.collection, totals(run.team, "step", own)[0][0])

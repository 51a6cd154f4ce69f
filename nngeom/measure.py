"""From a model and data to a matrix: one function a measure, each a metric handed to the same machinery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, NonFiniteError, UnsupportedError
from nngeom.core.statistic import Sums
from nngeom.generator.sweep import Metric, Sweep, require_examples
from nngeom.generator.task import Task
from nngeom.metrics.fisher import ExactFisher, MonteCarloFisher, as_likelihood, seed_of
from nngeom.metrics.likelihood import Likelihood
from nngeom.metrics.loss import EmpiricalFisher, GaussNewton, Loss, as_loss
from nngeom.pmat.implicit import PMatImplicit, implicit
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.mixed import as_representation
from nngeom.pmat.recipe import Scope
from nngeom.space.collection import LayerCollection


def FIM(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    likelihood: str | Likelihood = "categorical",
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The Fisher information matrix, with the expectation over labels in closed form.

    ``F = 1/n sum_i E_y[s s^T]`` with the score ``s`` of ``log p(y | x_i)`` in the parameters; targets in the batches
    are not used (but for positions that ``ignore_index`` leaves out). ``representation`` is a PMat class, one with
    options, or ``PMatMixed({...})``; ``options`` go to the representation. Outputs are ``(n, c)``, or ``(n, *shape)``
    with a likelihood that says what the axes are.

    Raises :class:`LoaderError`, :class:`OutputError`, :class:`ModeError`, :class:`CoverageError`,
    :class:`NonFiniteError` and what the representation raises. Source: George 2023, thesis, sections 2.4, 3.2.2.
    """
    return measure(
        model, loader, representation, ExactFisher(as_likelihood(likelihood)), "FIM", True,
        function, layer_collection, progress, memory_budget, check, process_group, options,
    )  # fmt: skip


def FIM_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    likelihood: str | Likelihood = "categorical",
    samples: int = 1,
    generator: torch.Generator | None = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The Fisher information matrix with ``samples`` labels an example drawn from the model: unbiased, one backward a sample.

    Draws are keyed by (a seed taken from ``generator``, the running index of the example, the sample), so that they do
    not depend on the batch size. Other arguments and errors as :func:`FIM`.
    """
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples is {samples!r}; expected a whole number of at least 1")
    metric = MonteCarloFisher(as_likelihood(likelihood), samples, seed_of(generator))
    return measure(
        model, loader, representation, metric, "FIM_MonteCarlo", False,
        function, layer_collection, progress, memory_budget, check, process_group, options,
    )  # fmt: skip


def EmpiricalFIM(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The second moment of per-example loss gradients, ``1/n sum_i g_i g_i^T``, with the targets of the batches.

    ``loss``: ``"cross_entropy"``, ``"mse"`` (``0.5 * (f - y)**2`` summed over outputs), :class:`CrossEntropy`, or a
    function ``(outputs, targets) -> (n,)``. Not the Fisher matrix unless the model is right about its labels. Other
    arguments and errors as :func:`FIM`.
    """
    return measure(
        model, loader, representation, EmpiricalFisher(as_loss(loss)), "EmpiricalFIM", True,
        function, layer_collection, progress, memory_budget, check, process_group, options,
    )  # fmt: skip


def GGN(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The generalised Gauss-Newton matrix ``1/n sum_i J_i^T (d2 loss_i / df2) J_i`` of a loss convex in the outputs.

    Losses as in :func:`EmpiricalFIM`; a function that is not convex in the outputs raises :class:`ArgumentError`.
    Other arguments and errors as :func:`FIM`.
    """
    return measure(
        model, loader, representation, GaussNewton(as_loss(loss)), "GGN", True,
        function, layer_collection, progress, memory_budget, check, process_group, options,
    )  # fmt: skip


def measure(
    model: nn.Module,
    loader: Any,
    representation: Any,
    metric: Metric,
    label: str,
    reread: bool,
    function: Callable[..., Tensor] | None,
    layer_collection: LayerCollection | None,
    progress: bool,
    memory_budget: int | None,
    check: bool,
    process_group: Any,
    options: dict[str, Any],
) -> Any:
    """Any metric in any representation: the representation's recipe driven over sweeps of the data."""
    if process_group is not None:
        raise UnsupportedError("process_group is not available yet; pass process_group=None and merge shards afterwards")
    task = Task.build(model, function, layer_collection)
    with memory.limit(memory_budget):
        sweep = Sweep(task, loader, metric, memory_budget, check, progress, reread=reread, label=label)
        if representation is PMatImplicit:
            if options:
                raise ArgumentError(f"PMatImplicit has no option {list(options)}")
            return implicit(sweep)
        chosen = as_representation(representation, **options)
        sweep.part_of = chosen.part_of
        blocks = drive(chosen.recipe(Scope(task.collection, task.collection.names)), sweep, chosen.passes)
    return chosen.kind._make(task.collection, blocks, sweep.count)


def drive(recipe: Any, sweep: Sweep, passes: int) -> dict[Any, Any]:
    """Send a recipe the means of the statistics it asks for, one sweep each."""
    statistic, first = next(recipe), True
    while True:
        sums, examples = Sums(), 0
        for chunk in sweep.chunks(keep=passes > 1, reuse=True) if first else sweep.again():
            with torch.no_grad():
                sums.add(statistic(chunk), chunk.examples if chunk.first else 0)
            examples = sums.count
        require_examples(examples)
        first = False
        means = sums.mean()
        _require_finite(means, sweep)
        try:
            statistic = recipe.send(means)
        except StopIteration as end:
            return end.value


def _require_finite(means: dict[Any, dict[str, Tensor]], sweep: Sweep) -> None:
    for block, tensors in means.items():
        for name, t in tensors.items():
            if not bool(torch.isfinite(t.sum())) and not bool(torch.isfinite(t).all()):
                layout = block[1] if isinstance(block, tuple) else block
                raise NonFiniteError(
                    f"the statistic {name!r} of parameters {list(layout.names)[:4]} overflowed to NaN or infinity over {sweep.count} examples; "
                    "scale the inputs or use a wider dtype, model.double()"
                )



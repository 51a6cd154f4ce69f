"""From a model and data to a matrix: one function a measure, each a metric handed to the same machinery."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, NonFiniteError, UnsupportedError
from nngeom.core.statistic import Sums, names_of
from nngeom.generator.sweep import Chunk, Metric, Sweep, require_examples
from nngeom.generator.task import Task
from nngeom.metrics.fisher import ExactFisher, MonteCarloFisher, as_likelihood, seed_of
from nngeom.metrics.likelihood import Likelihood
from nngeom.metrics.loss import EmpiricalFisher, GaussNewton, Loss, as_loss
from nngeom.metrics.probes import Probes
from nngeom.pmat.estimate import MatrixEstimate
from nngeom.pmat.implicit import PMatImplicit, implicit
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.mixed import as_representation
from nngeom.pmat.pmat import Representation
from nngeom.pmat.recipe import Means, Scope
from nngeom.space.collection import LayerCollection


def FIM(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    likelihood: str | Likelihood = "categorical",
    estimator: str | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
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
    are not used (but for positions that ``ignore_index`` leaves out). For a causal language model of ``transformers``
    and a dict batch with labels ``"categorical"`` is :class:`CausalLM`. ``representation`` is a PMat class, one with
    options, or ``PMatMixed({...})``; ``options`` go to the representation. Outputs are ``(n, c)``, or ``(n, *shape)``
    with a likelihood that says what the axes are.

    ``estimator="rademacher"``: for very many outputs, ``samples`` (default 8) random probes ``u = L r`` of them replace
    the columns of the square root ``L`` of their Fisher information, one backward pass each. The result is a
    :class:`MatrixEstimate`: its ``matrix`` is unbiased where the representation is linear in second moments of
    gradients (not EKFAC in a basis from the probes, but its trace; not the joined factors of KFAC for a parameter in
    unlike uses), its readings have standard errors, and it keeps ``samples`` matrices for them. Signs ``r`` are keyed
    as the draws of
    :func:`FIM_MonteCarlo`. Source: Hutchinson 1989.

    Raises :class:`LoaderError`, :class:`OutputError`, :class:`ModeError`, :class:`CoverageError`,
    :class:`NonFiniteError` and what the representation raises. Source: George 2023, thesis, sections 2.4, 3.2.2.
    """
    return measure(
        model,
        loader,
        representation,
        probed(ExactFisher(as_likelihood(likelihood, model)), estimator, samples, generator),
        "FIM",
        estimator is None,
        function,
        layer_collection,
        progress,
        memory_budget,
        check,
        process_group,
        options,
    )


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
    """The Fisher information matrix with ``samples`` labels an example drawn from the model: unbiased, one backward a
    sample.

    Draws are keyed by (a seed taken from ``generator``, the running index of the example, the sample), so that they do
    not depend on the batch size. Other arguments and errors as :func:`FIM`.
    """
    metric = MonteCarloFisher(as_likelihood(likelihood, model), require_samples(samples), seed_of(generator))
    return measure(
        model,
        loader,
        representation,
        metric,
        "FIM_MonteCarlo",
        False,
        function,
        layer_collection,
        progress,
        memory_budget,
        check,
        process_group,
        options,
    )


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

    ``loss``: ``"cross_entropy"``, ``"mse"`` (``0.5 * (f - y)**2`` summed over outputs), ``"bce"``, ``"poisson"``,
    :class:`CrossEntropy`, :class:`CausalLM` (what ``"cross_entropy"`` is for causal language models of
    ``transformers``), ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss`` and ``nn.PoissonNLLLoss``
    modules, whose ``reduction`` is not ours, or a function ``(outputs, targets) -> (n,)``. Not the Fisher matrix unless
    the model is right about its labels. Raises :class:`OutputError` on targets that do not fit; other arguments and
    errors as :func:`FIM`.
    """
    return measure(
        model,
        loader,
        representation,
        EmpiricalFisher(as_loss(loss, model)),
        "EmpiricalFIM",
        True,
        function,
        layer_collection,
        progress,
        memory_budget,
        check,
        process_group,
        options,
    )


def GGN(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    estimator: str | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
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
    ``estimator="rademacher"``, ``samples`` and ``generator`` as in :func:`FIM`: random probes of very many outputs.
    Other arguments and errors as :func:`FIM`.
    """
    return measure(
        model,
        loader,
        representation,
        probed(GaussNewton(as_loss(loss, model)), estimator, samples, generator),
        "GGN",
        estimator is None,
        function,
        layer_collection,
        progress,
        memory_budget,
        check,
        process_group,
        options,
    )


def probed(
    metric: ExactFisher | GaussNewton, estimator: str | None, samples: int | None, generator: torch.Generator | None
) -> Metric:
    """The metric, or random probes of it."""
    if estimator is None:
        if samples is not None or generator is not None:
            raise ArgumentError(
                "samples= and generator= go with estimator='rademacher'; without it the measure is exact "
                "(FIM_MonteCarlo draws labels)"
            )
        return metric
    if estimator != "rademacher":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'rademacher', or None for all outputs")
    count = require_samples(8 if samples is None else samples)
    return Probes(metric, count, seed_of(generator), count**-0.5)


def require_samples(samples: Any) -> int:
    """A number of draws; raises :class:`ArgumentError`."""
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples is {samples!r}; expected a whole number of at least 1")
    return samples


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
        raise UnsupportedError(
            "process_group is not available yet; pass process_group=None and merge shards afterwards"
        )
    task = Task.build(model, function, layer_collection)
    with memory.limit(memory_budget):
        sweep = Sweep(task, loader, metric, memory_budget, check, progress, reread=reread, label=label)
        if representation is PMatImplicit:
            if options:
                raise ArgumentError(f"PMatImplicit has no option {list(options)}")
            return implicit_estimate(sweep) if isinstance(metric, Probes) else implicit(sweep)
        chosen = as_representation(representation, **options)
        sweep.part_of = chosen.part_of
        if isinstance(metric, Probes):
            return estimate(chosen, sweep)
        blocks = drive(chosen.recipe(Scope(task.collection, task.collection.names)), sweep, chosen.passes)
    return chosen.kind._make(task.collection, blocks, sweep.count)


def drive(recipe: Any, sweep: Sweep, passes: int) -> dict[Any, Any]:
    """Send a recipe the means of the statistics it asks for, one sweep each."""
    statistic, first = next(recipe), True
    while True:
        sums, examples = Sums(), 0
        for chunk in sweep.chunks(keep=passes > 1, reuse=True, watch=False) if first else sweep.again():
            with torch.no_grad():
                sums.add(statistic, chunk)
            examples = sums.count
        require_examples(examples)
        first = False
        means = one_dtype(sums.mean(used_up=True))
        _require_finite(means, sweep)
        try:
            statistic = recipe.send(means)
        except StopIteration as end:
            return end.value


def estimate(chosen: Representation, sweep: Sweep) -> MatrixEstimate:
    """The matrix of every probe by itself, and of all, in one sweep; representations of several sweeps take their basis
    from a matrix of all first.
    """
    probes: Probes = sweep.metric  # type: ignore[assignment]
    scope = Scope(sweep.task.collection, sweep.task.collection.names)
    make = lambda blocks: chosen.kind._make(sweep.task.collection, blocks, sweep.count)
    if chosen.passes > 1:
        chosen = chosen.last_sweep(make(drive(chosen.recipe(scope), sweep, chosen.passes)))
    sweep.metric = replace(probes, scale=1.0)
    recipes = [chosen.recipe(scope) for _ in range(probes.count + 1)]
    statistics = [next(recipe) for recipe in recipes]
    draws = [Sums() for _ in range(probes.count)]
    for chunk in sweep.chunks(reuse=True):
        for j, one in cotangents(chunk):
            with torch.no_grad():
                draws[j].add(statistics[j], one)
    require_examples(sweep.count)
    for other in draws[1:]:
        other.share_inputs(draws[0])  # taken once, for all
    means = [one_dtype(d.mean()) for d in draws]
    whole = one_dtype(Sums().merge(draws).mean())
    _require_finite(whole, sweep)
    *each, matrix = [make(_finish(recipe, m)) for recipe, m in zip(recipes, (*means, whole))]
    return MatrixEstimate(matrix, tuple(each))


def cotangents(chunk: Chunk) -> Iterator[tuple[int, Chunk]]:
    """Every cotangent of a chunk by itself, with its number."""
    lo, total = chunk.outputs
    for j in range(next((x.shape[0] for x in chunk.jacobians.values()), 0)):
        yield (
            lo + j,
            replace(
                chunk,
                jacobians={lay: x.cotangents(j, j + 1) for lay, x in chunk.jacobians.items()},
                outputs=(lo + j, total),
            ),
        )


def _finish(recipe: Any, means: dict[Any, dict[str, Tensor]]) -> dict[Any, Any]:
    """The blocks of a recipe sent the last means it asked for."""
    try:
        recipe.send(means)
    except StopIteration as end:
        return end.value
    raise UnsupportedError(
        "a representation of several sweeps is not estimated from random probes; use one of a single sweep"
    )


def implicit_estimate(sweep: Sweep) -> MatrixEstimate:
    """Products with the mean over all probes, and with each."""
    matrix, probes = implicit(sweep), sweep.metric
    alone = [replace(probes, count=1, first=j, scale=1.0) for j in range(probes.count)]  # type: ignore[attr-defined, type-var]
    return MatrixEstimate(matrix, tuple(replace(matrix, sweep=replace(matrix.sweep, metric=m)) for m in alone))


def one_dtype(means: Means) -> Means:
    """The widest dtype of all for each: layers of a model may differ."""
    dtypes = {t.dtype for tensors in means.values() for t in tensors.values()}
    if len(dtypes) < 2:
        return means
    wide = functools.reduce(torch.promote_types, dtypes)
    return {block: {name: t.to(wide) for name, t in tensors.items()} for block, tensors in means.items()}


def _require_finite(means: dict[Any, dict[str, Tensor]], sweep: Sweep) -> None:
    for block, tensors in means.items():
        for name, t in tensors.items():
            if not bool(torch.isfinite(t.sum())) and not bool(torch.isfinite(t).all()):
                sweep.blame()
                raise NonFiniteError(
                    f"the statistic {name!r} of {names_of(block)[:4]} overflowed to NaN or infinity over {sweep.count} "
                    "examples; "
                    "scale the inputs or use a wider dtype, model.double()"
                )

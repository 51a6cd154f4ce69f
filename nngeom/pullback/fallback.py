"""Exact rows for parameters used in ways no adapter knows: one example at a time.

Each example is run by itself; where its outputs are those it has in the batch, so are its rows. A model that cannot run
on one example of a batch is pulled back from cotangents that are zero for all but one example, at the cost of a
backward pass over the batch a row: always right, whatever the model does with its parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.capture.fused import twice_differentiable
from nngeom.capture.network import Network, gradients_on, take
from nngeom.capture.recorder import Capture
from nngeom.capture.remedies import gradients
from nngeom.core import memory
from nngeom.core.draws import factors, outer
from nngeom.core.errors import CoverageError
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.linalg import accumulation_dtype, flat_rows
from nngeom.pullback.backward import dense, pull_back
from nngeom.pullback.separate import ADDED_UP, MIXES, require_separate, same_outputs

HOOKED = (
    "functions that are registered on gradients (register_hook) change them in a way that is not linear in each "
    "example by itself (clipping, normalising, a batch mean), so that there is no Jacobian; remove them to measure"
)


def full_jacobians(
    network: Network,
    capture: Capture,
    names: Sequence[str],
    v: Tensor,
    *,
    create_graph: bool = False,
    apart: bool = True,
    check: bool = True,
) -> list[LayerJacobian]:
    """``v [k, n, *out]`` -> the rows ``[k, n, 1, 1, p]`` of each of the parameters ``names``.

    ``check``: raises :class:`CoverageError` where an example by itself shows that the model mixes them. With a graph to
    be differentiated again, examples are run by themselves only where they are known to be ``apart``: rows that agree
    where a factor is zero have other derivatives.
    """
    several = capture.outputs.shape[0] > 1 and (apart or not create_graph)
    if check and network.hooked.intersection(names):
        _require_linear(capture, [capture.leaves.tensors[name] for name in names if name in network.hooked])
    rows = _alone(network, capture, names, v, create_graph=create_graph, check=check) if several else None
    parameters = [capture.leaves.tensors[name] for name in names]
    rows = rows or _masked(capture.outputs, parameters, v, create_graph=create_graph)
    return [FullJacobian(r.to(accumulation_dtype(r.dtype))[:, :, None, None]) for r in rows]


def _alone(
    network: Network, capture: Capture, names: Sequence[str], v: Tensor, *, create_graph: bool, check: bool
) -> list[Tensor] | None:
    """``[k, n, p]`` a parameter, every example by itself; ``None`` where an example by itself is not what it is in the
    batch.
    """
    outputs, parameters = capture.outputs, [capture.leaves.tensors[name] for name in names]
    n, shapes = outputs.shape[0], [p.shape for p in parameters]
    chosen = [network.collection.names.index(name) for name in names]
    pieces: list[list[Tensor]] = [[] for _ in parameters]
    for i in range(n):
        try:
            with gradients_on(), twice_differentiable() if create_graph else contextlib.nullcontext():
                out, leaves = capture.leaves.of_a_run(take(capture.batch, slice(i, i + 1), n))
        except Exception:  # a model that cannot run on one example of this batch
            return None
        if not same_outputs(out.detach(), outputs[i : i + 1].detach(), outputs.detach()):
            if check and out.shape == outputs[i : i + 1].shape:
                require_separate(network, capture.batch, outputs, [[i]])
            return None
        own = [leaves[j] for j in chosen]
        pulled = pull_back(out, own, shapes, v[:, i : i + 1], retain=False, create_graph=create_graph)
        for rows, g in zip(pieces, pulled):
            rows.append(flat_rows(g))
    rows = [torch.stack(r, 1) for r in pieces]
    if not check or _add_up(outputs, parameters, v, rows):
        return rows
    if not all(bool(torch.isfinite(r).all()) for r in rows):
        return rows  # no comparison; the measure names the layer
    raise CoverageError(HOOKED if capture.hooked or capture.graph().module_hooks else MIXES)


def _add_up(outputs: Tensor, parameters: Sequence[Tensor], v: Tensor, rows: list[Tensor]) -> bool:
    """Whether a random combination of rows is the gradient in the batch: equal outputs do not tell where a factor is
    zero.
    """
    u = torch.randn(v.shape[:2], generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(v)
    together = torch.einsum("kn,kn...->n...", u, v).to(outputs.dtype)
    noise = 100 * torch.finfo(outputs.dtype).eps * u.norm() * max(float(r.detach().norm()) for r in rows)
    for p, r, g in zip(parameters, rows, gradients(outputs, parameters, together, retain_graph=True)):
        got = torch.einsum("kn,knp->p", u.to(r), r.detach())
        expected = torch.zeros_like(got) if g is None else dense(g).flatten().to(got)
        difference, tolerance = (got - expected).norm(), ADDED_UP.get(outputs.dtype, 0.1)
        if not bool(difference <= tolerance * r.detach().norm() * u.norm() + noise):
            if not bool(difference <= tolerance * _usual(outputs, p, together)):
                return False
    return True


def _require_linear(capture: Capture, parameters: Sequence[Tensor]) -> None:
    """Raise :class:`CoverageError` where functions registered on gradients of parameters are not linear: rows would not
    be those of any matrix.
    """
    outputs, generator = capture.outputs, torch.Generator().manual_seed(10)
    u = [outer(factors(outputs.shape, generator, outputs.detach())) for _ in range(2)]
    pulled = [gradients(outputs, parameters, x, retain_graph=True) for x in (*u, u[0] + u[1])]
    for x, y, both in zip(*(map(dense, some) for some in pulled)):
        if both is not None and x is not None and y is not None:
            size = x.norm() + y.norm()
            if bool(torch.isfinite(size)) and not bool(
                (x + y - both).norm() <= ADDED_UP.get(outputs.dtype, 0.1) * size
            ):
                raise CoverageError(HOOKED)


def _usual(outputs: Tensor, parameter: Tensor, v: Tensor) -> Tensor:
    """How long a gradient is for a cotangent as long as ``v``: gradients that cancel, as those of a shift of all
    logits, are rounding beside it.
    """
    random = torch.randn(v.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(v)
    (g,) = gradients(outputs, [parameter], random * (v.norm() / random.norm()), retain_graph=True)
    return v.new_zeros(()) if g is None else dense(g).norm()


def _masked(outputs: Tensor, parameters: Sequence[Tensor], v: Tensor, *, create_graph: bool) -> list[Tensor]:
    """``[k, n, p]`` a parameter, by cotangents of one example each."""
    k, n = v.shape[:2]
    pieces: list[list[Tensor]] = [[] for _ in parameters]
    each = (sum(p.numel() for p in parameters) + 4 * math.prod(v.shape[1:])) * v.element_size() * 2
    for lo, hi in memory.pieces(k * n, each):
        index = torch.arange(lo, hi, device=v.device)
        masked = v.new_zeros(hi - lo, *v.shape[1:])
        masked[torch.arange(hi - lo, device=v.device), index % n] = v[index // n, index % n]
        grads = pull_back(
            outputs, parameters, [p.shape for p in parameters], masked, retain=True, create_graph=create_graph
        )
        for rows, g in zip(pieces, grads):
            rows.append(flat_rows(g))
    return [torch.cat(rows).view(k, n, -1) for rows in pieces]

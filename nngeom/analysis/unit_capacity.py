"""Unit capacities of a net of two layers: how far each hidden unit has come, and how much it counts in the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.chain import Activation, Chain, chain_of, visited
from nngeom.analysis.rademacher import margins
from nngeom.analysis.spectral_margin import positive_margin, reference_weights
from nngeom.capture.network import require_targets
from nngeom.core.errors import ArgumentError, StructureError
from nngeom.layers.linear_map import LinearMap
from nngeom.sweep.run import Run


@dataclass(frozen=True)
class UnitCapacity:
    """What the capacity of ``V relu(U x)`` consists of, with ``U_0`` at the start, rows ``u_j``, and columns ``v_j``.

    ``capacity`` and ``impact`` ``(h,)``: ``|u_j - u0_j|`` and ``|v_j|``. ``value``: ``|U_0|_2 |V|_F + |U - U_0|_F |V|_F
    + sqrt(h)``, which does not depend on the data. ``complexity``: ``sum_j |v_j| (|u_j - u0_j| |X|_F + |X u0_j|)``,
    at most ``frobenius``: ``|V|_F (|U - U_0|_F |X|_F + |X U_0^T|_F)``. ``margin``: ``gamma``, a quantile of the margins
    of the ``examples = n``.
    """

    capacity: Tensor
    impact: Tensor
    value: Tensor
    complexity: Tensor
    frobenius: Tensor
    margin: Tensor
    examples: int

    @property
    def bound_term(self) -> Tensor:
        """``complexity / (gamma n)``: what the Rademacher complexity is bounded by, up to a factor ``O(sqrt(c))``."""
        return self.complexity / (self.margin * self.examples)


@torch.no_grad()
def unit_capacity(
    model: nn.Module,
    loader: Any,
    reference: nn.Module,
    *,
    quantile: float = 0.1,
    ignore_biases: bool = False,
    memory_budget: int | None = None,
) -> UnitCapacity:
    """The capacities of the hidden units of a net of two layers, and the measures of complexity made of them.

    ``model``: two linear maps and a ReLU between them (behind a flatten, where need be). ``reference``: a copy of it
    from the start of training. ``quantile``: of the margins on the examples of ``loader``, in [0, 1], that is
    ``gamma``. ``ignore_biases``: the definition has none, a model with biases is refused unless the weights alone are
    asked for. ``memory_budget``: bytes of temporaries.

    Raises :class:`StructureError` for other models or another reference, :class:`ArgumentError` for biases, no
    reference, or a ``gamma`` that is not positive. Source: Neyshabur et al. 2018, Towards understanding the role of
    over-parametrization, theorems 1 and 2, table 1.
    """
    if not 0 <= quantile <= 1:
        raise ArgumentError(f"quantile is {quantile}; expected a number in [0, 1]")
    if not isinstance(reference, nn.Module):
        raise ArgumentError(
            f"reference is {type(reference).__name__}; expected a copy of the model from the start of training"
        )
    run = Run.of(model, loader, memory_budget=memory_budget)
    with run.within():
        chain = _two_layers(chain_of(model))
        chain.require_without_biases("unit capacity", ignored=ignore_biases)
        u, v = (m.weight for m in chain.maps)
        start = reference_weights(chain, reference)[0]
        found, sizes, starts = [], [], []
        for _, batch, x, outputs in visited(run, chain):
            found.append(margins(outputs, require_targets(batch)))
            sizes.append(x.norm())
            starts.append((x.flatten(1) @ start.T).norm(dim=0))
    data, before = torch.stack(sizes).norm(), torch.stack(starts).norm(dim=0)
    capacity, impact = (u - start).norm(dim=1), v.norm(dim=0)
    return UnitCapacity(
        capacity=capacity,
        impact=impact,
        value=v.norm() * (torch.linalg.matrix_norm(start, 2) + capacity.norm()) + len(u) ** 0.5,
        complexity=impact @ (capacity * data + before),
        frobenius=v.norm() * (capacity.norm() * data + before.norm()),
        margin=positive_margin(torch.cat(found), quantile),
        examples=sum(map(len, found)),
    )


def _two_layers(chain: Chain) -> Chain:
    found = [step for step in chain.steps if step]
    if [step == Activation(0.0) for step in found] != [False, True, False] or [m.is_dense for m in chain.maps] != [
        True,
        True,
    ]:
        names = [type(step.module).__name__ if isinstance(step, LinearMap) else str(step) for step in found]
        raise StructureError(f"unit capacity is defined for Linear, ReLU, Linear; the model is {', '.join(names)}")
    return chain

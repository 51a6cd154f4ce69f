"""Spectral complexity over the margin: Lipschitz constants of the layers, and how far they are from a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.chain import Chain, chain_of, visited
from nngeom.analysis.rademacher import margins
from nngeom.capture.network import require_targets
from nngeom.core.errors import ArgumentError, StructureError
from nngeom.layers.linear_map import LinearMap
from nngeom.solve.lanczos import lanczos
from nngeom.sweep.run import Run


@dataclass(frozen=True)
class SpectralMargin:
    """The spectral complexity ``R`` of a chain of layers ``A_i``, and a margin ``gamma``.

    ``complexity``: ``R = prod_j L_j |A_j|_2 (sum_i (|(A_i - M_i)^T|_{2,1} / |A_i|_2)^(2/3))^(3/2)`` with the Lipschitz
    constants ``L`` of the activations. ``spectral_norms`` and ``distances`` ``(layers,)``: ``|A_i|_2``, and
    ``|(A_i - M_i)^T|_{2,1}``, the sum of the 2-norms of the rows. ``margin``: ``gamma``, a quantile of the margins of
    the ``examples = n``. ``data_norm``: ``|X|_F``.
    """

    complexity: Tensor
    spectral_norms: Tensor
    distances: Tensor
    margin: Tensor
    data_norm: Tensor
    examples: int

    @property
    def value(self) -> Tensor:
        """``R / gamma``."""
        return self.complexity / self.margin

    @property
    def bound_term(self) -> Tensor:
        """``|X|_F R / (gamma n)``: what the generalisation gap is bounded by, up to constants and logarithms."""
        return self.value * self.data_norm / self.examples


@torch.no_grad()
def spectral_margin(
    model: nn.Module,
    loader: Any,
    reference: nn.Module | None = None,
    *,
    quantile: float = 0.1,
    ignore_biases: bool = False,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> SpectralMargin:
    """The spectral complexity of ``model`` over its margin on the examples of ``loader``.

    ``model``: a chain of linear maps, convolutions, ReLU and leaky ReLU. ``reference``: whose layers are ``M_i``, a
    copy from the start of training; zero without one. ``quantile``: of the margins, in [0, 1], that is ``gamma``.
    ``ignore_biases``: the definition has none, a model with biases is refused unless the weights alone are asked for
    (the margins stay the model's). Convolutions are the matrices that they are on inputs of this size; their spectral
    norms come by Lanczos on the convolution and its transpose, until the residual is below ``tol`` times the squared
    norm, from a vector drawn by ``generator`` (seeded by default). ``memory_budget``: bytes of temporaries.

    Raises :class:`StructureError` for other models or another reference, :class:`ArgumentError` for biases, or a
    ``gamma`` that is not positive (too many examples on the wrong side). Source: Bartlett, Foster and Telgarsky 2017,
    eq. 1.2, theorem 1.1.
    """
    if not 0 <= quantile <= 1:
        raise ArgumentError(f"quantile is {quantile}; expected a number in [0, 1]")
    run = Run.of(model, loader, memory_budget=memory_budget)
    with run.within():
        layers = chain_of(model)
        layers.require_without_biases("the spectral complexity", ignored=ignore_biases)
        starts = reference_weights(layers, reference)
        found, sizes, at_data = [], [], layers
        for chain, batch, x, outputs in visited(run, layers):
            found.append(margins(outputs, require_targets(batch)))
            sizes.append(x.norm())
            at_data = chain
        gamma = positive_margin(torch.cat(found), quantile)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        norms = torch.stack([spectral_norm(m, tol, generator) for m in at_data.maps])
        distances = torch.stack([m.row_norms(m.weight - w).sum() for m, w in zip(at_data.maps, starts)])
    return SpectralMargin(
        _complexity(layers, norms, distances),
        norms,
        distances,
        gamma,
        torch.stack(sizes).norm(),
        sum(map(len, found)),
    )


def spectral_norm(m: LinearMap, tol: float, generator: torch.Generator) -> Tensor:
    """The largest singular value of the matrix that ``m`` is on inputs of its shape."""
    w = m.weight
    if not bool(w.any()):
        return w.new_zeros(())
    if m.is_dense:
        return torch.linalg.matrix_norm(w, 2)
    x = torch.randn(1, *m.shape, dtype=w.dtype, device=generator.device, generator=generator).to(w.device)
    transposed: Any = torch.func.vjp(lambda v: m(v, w), x)[1]
    values, _ = lanczos(lambda v: transposed(m(v.view_as(x), w))[0].flatten(), x.flatten(), 1, tol=tol)
    return values[0].clamp_min(0).sqrt()


def reference_weights(chain: Chain, reference: nn.Module | None) -> list[Tensor]:
    """The weights ``M_i`` of a reference in the order of the chain's maps, zeros without one."""
    if reference is None:
        return [torch.zeros_like(m.weight) for m in chain.maps]
    others = chain_of(reference).maps
    shapes = [[tuple(m.weight.shape) for m in maps] for maps in (chain.maps, others)]
    if shapes[0] != shapes[1]:
        raise StructureError(
            f"weights of model and reference have shapes {shapes[0]} and {shapes[1]}; expected two copies of one model"
        )
    return [other.weight.to(m.weight) for m, other in zip(chain.maps, others)]


def positive_margin(found: Tensor, quantile: float) -> Tensor:
    """The ``quantile`` of margins ``found (n,)``; raises :class:`ArgumentError` where it is not positive."""
    gamma = found.quantile(quantile)
    if not gamma > 0:
        raise ArgumentError(
            f"the {quantile} quantile of the margins is {float(gamma):.3g}, {float((found > 0).double().mean()):.0%} "
            "of the examples are on the right side; expected a positive margin: train further, or take a higher one"
        )
    return gamma


def _complexity(chain: Chain, norms: Tensor, distances: Tensor) -> Tensor:
    """Without dividing by a norm, that may be zero."""
    others = torch.stack([torch.cat([norms[:i], norms[i + 1 :]]).prod() for i in range(len(norms))])
    lipschitz = math.prod(a.lipschitz for a in chain.activations)
    return lipschitz * ((distances * others) ** (2 / 3)).sum() ** 1.5

"""The loss of a batch differentiated once, with the graph to differentiate it again, and whether its second
derivatives can be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.fused import twice_differentiable
from nngeom.capture.graph import once_only
from nngeom.capture.network import Batch, Network, gradients_on, require_finite
from nngeom.capture.remedies import gradients
from nngeom.core import memory
from nngeom.core.errors import CoverageError, NonFiniteError
from nngeom.core.linalg import flat_rows
from nngeom.cotangents.loss import judged
from nngeom.cotangents.own_examples import undrawn
from nngeom.cotangents.per_example import Loss
from nngeom.cotangents.separable import SquaredError
from nngeom.pullback.backward import pull_back


@dataclass(frozen=True, eq=False)
class SecondDerivatives:
    """The summed loss of one batch, differentiated once, with the graph to differentiate it again."""

    network: Network
    gradients: dict[str, Tensor | None]
    examples: int
    width: int  # bytes of the activations, roughly

    def times(
        self, names: tuple[str, ...], columns: Callable[[int, int], Tensor], count: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """``(lo, hi, [hi - lo, p])``: the block of ``names`` times the vectors ``columns(lo, hi)``, as many as fit
        the budget."""
        parameters = [self.network.parameters[n] for n in names]
        used = [
            p.new_zeros(p.shape) if g is None else g
            for g, p in ((self.gradients[n], p) for n, p in zip(names, parameters))
        ]
        with gradients_on():  # under no_grad they would be joined without their graph, and every product be zero
            flat = torch.cat([g.flatten() for g in used])
        each = 4 * (flat.numel() * flat.element_size() + self.width)
        for lo, hi in memory.pieces(count, each, "column of the Hessian"):
            v = columns(lo, hi).to(flat.dtype)
            if not flat.requires_grad:
                yield lo, hi, torch.zeros_like(v)
                continue
            try:
                with twice_differentiable(self.network.model):
                    pulled = pull_back(flat, parameters, [p.shape for p in parameters], v, retain=True)
            except RuntimeError as error:
                if "not implemented" not in str(error) and "ouble backward" not in str(error):
                    raise
                raise once_only(str(error)) from error
            yield lo, hi, torch.cat([flat_rows(x.detach()) for x in pulled], 1)


def require_symmetric(second: SecondDerivatives, usual: Callable[[], SecondDerivatives]) -> None:
    """Raise where ``<u, H v>`` and ``<v, H u>`` differ: some operation of the model has a wrong second derivative.

    Not where all of them are below the rounding of what they are the remains of, as those of a saturated loss: that
    is told by the derivatives of a quadratic function of the same outputs, ``usual``, and by what the dtype can hold
    at all.
    """
    network = second.network
    w = torch.randn(2, network.collection.numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        network.device
    )

    def products(of: SecondDerivatives) -> Tensor:
        rows = torch.cat([rows for _, _, rows in of.times(network.collection.names, lambda lo, hi: w[lo:hi], 2)])
        return require_finite_rows(rows, network.collection.names).to(w.dtype)

    rows = products(second)
    infos = [torch.finfo(p.dtype) for p in network.parameters.values()]
    eps, least = max(info.eps for info in infos), max(info.tiny / info.eps for info in infos)
    scale = rows.norm(dim=1).max()
    difference = (rows[0] @ w[1] - rows[1] @ w[0]).abs()
    if bool(difference <= 100 * eps**0.5 * scale + least):  # room for TF32 convolutions
        return
    if bool(difference <= 100 * eps * products(usual()).norm(dim=1).max()):
        return
    raise CoverageError(
        f"the second derivatives of the model are not symmetric (<u, H v> = {float(rows[0] @ w[1]):.6e}, <v, H u> = "
        f"{float(rows[1] @ w[0]):.6e}): an "
        "operation, perhaps a custom torch.autograd.Function, is not differentiated rightly when differentiated twice"
    )


@dataclass(frozen=True)
class Quadratic(SquaredError):
    """One half of the squared outputs, whatever the targets."""

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return super().__call__(outputs, torch.zeros_like(outputs))


def differentiated(network: Network, loss: Loss, batch: Batch, index: int, width: int) -> SecondDerivatives:
    """The summed loss of batch ``index`` differentiated once; ``width``: bytes of the activations of an example,
    roughly.

    Raises :class:`NonFiniteError`, and :class:`CoverageError` where the loss reaches no selected parameter.
    """
    network.require_whole("second derivatives")
    with gradients_on(), twice_differentiable(network.model):
        outputs = network.run(batch)
        require_finite(outputs.detach(), "outputs", index)
        loss, y = judged(loss, outputs, batch)
        with undrawn(outputs):
            loss.require_separate(outputs, y)
            value = loss.precisely(outputs, y).sum()
        if not value.requires_grad:
            raise CoverageError(
                "the loss does not depend on any selected parameter by differentiable operations (torch.no_grad or "
                ".detach() inside?)"
            )
        pulled = gradients(value, list(network.parameters.values()), None, create_graph=True)
    n = outputs.shape[0]
    return SecondDerivatives(network, dict(zip(network.parameters, pulled)), n, n * width)


def require_finite_rows(m: Tensor, names: tuple[str, ...]) -> Tensor:
    """``m``; raises :class:`NonFiniteError` naming the parameters ``names`` where it holds NaN or infinity."""
    if not bool(torch.isfinite(m).all()):
        raise NonFiniteError(
            f"second derivatives of parameters {list(names)[:4]} contain NaN or infinity; check the inputs, or use "
            "model.double()"
        )
    return m

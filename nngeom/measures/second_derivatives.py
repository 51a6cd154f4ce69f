"""The loss of a batch differentiated once, with the graph to differentiate it again, and whether its second
derivatives can be right."""

from __future__ import annotations

import contextlib
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
from nngeom.pullback.backward import dense, pull_back


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
            with self._again():
                pulled = pull_back(flat, parameters, [p.shape for p in parameters], v, retain=True)
            yield lo, hi, torch.cat([flat_rows(x.detach()) for x in pulled], 1)

    def add_product_(self, total: Tensor, x: Tensor) -> None:
        """Add the matrix of all parameters times one vector ``x [d]`` to ``total [d]``, parameter by parameter where
        they lie: beside the two passes every copy of a vector would be read from and written to memory.
        """
        parameters = list(self.network.parameters.values())
        sizes = [p.numel() for p in parameters]
        parts = zip(self.gradients.values(), x.split(sizes))
        pairs = [(g, part.view_as(g).to(g.dtype)) for g, part in parts if g is not None and g.requires_grad]
        if not pairs:
            return
        slopes, vectors = zip(*pairs)
        with self._again():
            pulled = gradients(slopes, parameters, vectors, retain_graph=True)
        for part, g in zip(total.split(sizes), pulled):
            if g is not None:
                part.view(g.shape).add_(dense(g.detach()))

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Within: gradients are differentiated; raises :class:`UnsupportedError` where an operation has no second
        derivative.
        """
        try:
            with twice_differentiable(self.network.model):
                yield
        except RuntimeError as error:
            if "not implemented" not in str(error) and "ouble backward" not in str(error):
                raise
            raise once_only(str(error)) from error


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
    with gradients_on():
        with twice_differentiable(network.model):
            outputs = network.run(batch)
        require_finite(outputs.detach(), "outputs", index)
        loss, y = judged(loss, outputs, batch)
        value, slope = outputs, loss.slope(outputs, y)
        if slope is None:
            with twice_differentiable(network.model), undrawn(outputs):
                loss.require_separate(outputs, y)
                value = loss.precisely(outputs, y).sum()
        if not value.requires_grad:
            raise CoverageError(
                "the loss does not depend on any selected parameter by differentiable operations (torch.no_grad or "
                ".detach() inside?)"
            )
        with twice_differentiable(network.model):
            pulled = gradients(value, list(network.parameters.values()), slope, create_graph=True)
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

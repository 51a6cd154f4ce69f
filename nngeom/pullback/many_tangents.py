"""Products of many vectors with the Jacobian of one batch: one forward pass, one backward pass with its graph, and what
is pulled back through both for all vectors at once.

``J^T u`` is linear in ``u``, so its derivative in ``u`` is ``J``: a batched backward pass through the graph of the
backward pass gives ``J v`` for all ``v``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.capture.fused import twice_differentiable
from nngeom.capture.network import Batch, Network, gradients_on
from nngeom.core import memory
from nngeom.core.draws import inner_products
from nngeom.pullback.backward import Pile, dense, pull_back
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.sizes import numbers

AGREE = 1e-6  # relative; parts of a float64 model may compute in float32


@dataclass(frozen=True, eq=False)
class ManyTangents:
    """The ``outputs`` of a batch with their graph, and ``pulled [d]``, what they pull ``u = 0`` back to, with its
    graph; all of a ``network`` on a ``batch``.

    :meth:`push` and :meth:`pull` are the products with ``J`` and ``J^T``. Nothing says yet that they are right:
    :meth:`require_adjoint`, of the vectors at hand, or :meth:`require_right`, of all, once a graph.
    """

    network: Network
    batch: Batch
    outputs: Tensor
    u: Tensor
    pulled: Tensor

    @staticmethod
    def of(network: Network, batch: Batch) -> ManyTangents:
        """One forward and one backward pass; raises :class:`RuntimeError` where torch has no second derivatives."""
        if network.distributed is not None:
            raise RuntimeError("distributed tensors have no right second derivatives")
        parameters = list(network.parameters.values())
        with gradients_on(), twice_differentiable():
            outputs = network.run(batch)
            u = torch.zeros_like(outputs, requires_grad=True)
            grads = torch.autograd.grad(outputs, parameters, u, create_graph=True, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else dense(g) for g, p in zip(grads, parameters)]
            return ManyTangents(network, batch, outputs, u, torch.cat([g.flatten() for g in whole]))

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """``(lo, hi)`` of the vectors that the budget has room for at once."""
        made = self.pulled.numel() + numbers(self.outputs)
        return list(memory.pieces(count, 4 * made * self.outputs.element_size()))

    def push(self, v: Tensor) -> Tensor:
        """``J v``: ``[b, d] -> [b, *outputs.shape]``."""
        if not self.pulled.requires_grad:
            return self.outputs.new_zeros(len(v), *self.outputs.shape)
        with gradients_on(), twice_differentiable():
            (pushed,) = pull_back(self.pulled, [self.u], [self.u.shape], v.to(self.pulled.dtype), retain=True)
        return pushed.detach()

    def pull(self, u: Tensor) -> Tensor:
        """``J^T u``: ``[b, *outputs.shape] -> [b, d]``."""
        parameters = list(self.network.parameters.values())
        shapes = [p.shape for p in parameters]
        flat = u.new_empty(len(u), self.network.collection.numel, dtype=self.network.dtype)
        places = [part.view(len(u), *s) for part, s in zip(flat.split([s.numel() for s in shapes], 1), shapes)]
        piles = [Pile(len(u), empty=lambda sizes, like, place=place: place) for place in places]
        for g, place in zip(pull_back(self.outputs, parameters, shapes, u, retain=True, piles=piles), places):
            if g.data_ptr() != place.data_ptr():
                place.copy_(g)
        return flat

    def require_adjoint(self, u: Tensor, pushed: Tensor, pulled: Tensor, v: Tensor) -> None:
        """Raise :class:`RuntimeError` unless ``<u, J v> = <J^T u, v>`` for every vector, to rounding.

        Zeros prove nothing: where some vector is pushed to them :meth:`require_right` is asked.
        """
        left, right = inner_products(u, pushed), inner_products(pulled, v)
        rounding = torch.finfo(pushed.dtype).eps
        if bool(((left - right).abs() <= max(rounding**0.5, AGREE) * left.abs()).all()) and bool((left != 0).all()):
            return
        sizes = [x.flatten(1).norm(dim=1).double() for x in (u, pushed, pulled, v)]
        room = max(rounding**0.5, AGREE) * left.abs() + 100 * rounding * (sizes[0] * sizes[1] + sizes[2] * sizes[3])
        if bool((torch.isfinite(room) & ~((left - right).abs() <= room)).any()):
            raise RuntimeError("the backward pass and its derivative disagree at these numbers")
        if not bool((sizes[1] > 0).all()):
            self.require_right()

    def require_right(self) -> None:
        """Raise :class:`RuntimeError` unless ``J`` is known to be the transpose of ``J^T``, or found to be."""
        if not Linearization(self.network).twice_is_right(self.batch, self.outputs):
            raise RuntimeError("derivatives of the model are not differentiated rightly")

"""Products with the Jacobian of the outputs, without forming it: forward mode, or double backward, and reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nngeom.capture.exchanged import exchanged
from nngeom.capture.fused import ReverseConventions, twice_differentiable, unfused
from nngeom.capture.graph import read
from nngeom.capture.network import RUNNING, Batch, Network, gradients_on
from nngeom.core.draws import dot, factors, outer
from nngeom.core.errors import NNGeomError
from nngeom.core.forward_mode import forward_mode
from nngeom.pullback.backward import dense

KEPT_BYTES = 2**26  # of a tangent that is held while the way to it is proved; larger ones are made once more
MOST = 1024  # answers of one model that are remembered


@dataclass(frozen=True, eq=False)
class Linearization:
    """Jacobian products of one task: ``J v`` in forward mode (or double backward), ``J^T u`` in reverse mode.

    Forward mode exchanges the parameters of the modules for tensors with a tangent: parameters that the model keeps
    elsewhere (in a closure, a list, a script) have none. Once a graph, ``<u, J v> = <J^T u, v>`` is asked of it, with
    as much of every parameter in it; where that fails double backward, which takes the parameters as they are, is asked
    the same.
    """

    network: Network

    def jvp(self, batch: Batch, v: dict[str, Tensor], *, ask: bool = True) -> tuple[Tensor, Tensor]:
        """Outputs (with their graph) and ``J v``, for one tangent; raises :class:`RuntimeError` where neither way is
        right.

        ``ask=False``: for a caller that compares the product with one in reverse mode itself.
        """
        if self.network.distributed is not None:
            raise RuntimeError("distributed tensors have neither forward mode nor right second derivatives")
        for way in (self._forward, self._twice):
            try:
                outputs, tangent = way(batch, v)
                if not ask and not self._misled():
                    return outputs, tangent
                right = self._known(way, outputs)
                if right is None and not ask:
                    return outputs, tangent
                if right is None:
                    kept = (
                        tangent if tangent.nbytes <= KEPT_BYTES else None
                    )  # asking takes as much memory as the product
                    del tangent
                    right = self._ask(way, batch, outputs)
                    if right:
                        tangent = way(batch, v)[1] if kept is None else kept
                if right:
                    return outputs, tangent
            except (NNGeomError, torch.OutOfMemoryError):
                raise
            except (
                RuntimeError
            ):  # no forward mode for some operation, or one that fails (group norm on channels-last tensors)
                if way == self._twice:
                    raise
        raise RuntimeError(
            "derivatives of the model are not differentiated rightly, neither in forward mode nor twice in reverse"
        )

    def _forward(self, batch: Batch, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        conventions = ReverseConventions(composed=True)
        with RUNNING, gradients_on(), unfused(), forward_mode():
            duals = {name: forward_ad.make_dual(p, v[name]) for name, p in self.network.parameters.items()}
            primal, tangent = forward_ad.unpack_dual(self._run(batch, duals, conventions))
        if conventions.hooked:
            raise RuntimeError("functions are registered on gradients, which forward mode does not run")
        return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()

    def _twice(self, batch: Batch, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with gradients_on(), twice_differentiable():
            outputs = self.network.run(batch)
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, list(self.network.parameters.values()), u, create_graph=True, allow_unused=True
            )
            parts = [(g * v[name]).sum() for name, g in zip(self.network.parameters, pulled) if g is not None]
            if not parts or not any(part.requires_grad for part in parts):
                return outputs, torch.zeros_like(outputs)
            (tangent,) = torch.autograd.grad(torch.stack(parts).sum(), u, retain_graph=True, allow_unused=True)
            return outputs, torch.zeros_like(outputs) if tangent is None else tangent.detach()

    def twice_is_right(self, batch: Batch, outputs: Tensor) -> bool:
        """Whether double backward gives ``J v`` on this ``batch``: remembered of the graph of its ``outputs``, or asked
        of them.
        """
        known = self._known(self._twice, outputs)
        return self._ask(self._twice, batch, outputs) if known is None else known

    def _keys(self, way: Callable[..., tuple[Tensor, Tensor]], outputs: Tensor) -> Iterator[tuple[object, ...]]:
        """Of the graph, then of these very outputs."""
        graph = read(outputs, self.network.ids, self.network.registered)
        key = way.__name__, graph.key, outputs.dtype, frozenset(self.network.hooked)
        yield key
        yield *key, float(outputs.detach().sum(dtype=torch.float64))

    def _misled(self) -> bool:
        """Whether some way was wrong of some graph of the model."""
        return False in _RIGHT.get(self.network.model, {}).values()

    def _known(self, way: Callable[..., tuple[Tensor, Tensor]], outputs: Tensor) -> bool | None:
        known = _RIGHT.setdefault(self.network.model, {})
        return next((known[key] for key in self._keys(way, outputs) if key in known), None)

    def _ask(self, way: Callable[..., tuple[Tensor, Tensor]], batch: Batch, outputs: Tensor) -> bool:
        """Whether ``<u, J v> = <J^T u, v>`` for a random ``u``, and ``v`` of every parameter so long that it adds
        between one and two.

        It is remembered of the graph, or where some parameter had no gradient to ask with, of these outputs.
        """
        known = _RIGHT.setdefault(self.network.model, {})
        if len(known) >= MOST:
            known.clear()
        right, all_asked = self._is_right(way, batch, outputs)
        of_graph, of_outputs = self._keys(way, outputs)
        known[of_graph if all_asked or not right else of_outputs] = right
        return right

    def _is_right(self, way: Callable[..., tuple[Tensor, Tensor]], batch: Batch, outputs: Tensor) -> tuple[bool, bool]:
        generator = torch.Generator().manual_seed(6)
        u = factors(outputs.shape, generator, outputs.detach())
        parameters = self.network.parameters
        pulled = torch.autograd.grad(outputs, list(parameters.values()), outer(u), retain_graph=True, allow_unused=True)
        gradients = {name: dense(g) for name, g in zip(parameters, pulled) if g is not None}
        del pulled
        lengths = {name: dot(g, g)[0] ** 0.5 for name, g in gradients.items()}
        rounding = torch.finfo(outputs.dtype).eps
        noise = 100 * rounding * max(lengths.values(), default=0.0)
        v, total, room = {}, 0.0, 0.0
        for name, p in parameters.items():
            length, share = lengths.get(name, 0.0), 1.0 + float(torch.rand((), generator=generator))
            g, asked = gradients.pop(name, None), length > 10 * noise
            v[name] = (g * (share / length**2)).to(p.dtype) if asked else torch.zeros_like(p)
            if asked:
                total, room = total + share, room + (share * noise / length) ** 2
        tangent = way(batch, v)[1]
        inner, terms = dot(outer(u), tangent)
        right = abs(inner - total) <= room**0.5 + max(rounding**0.5, 1e-6) * total + 100 * rounding * terms
        return right, min(lengths.get(name, 0.0) for name in parameters) > 10 * noise

    def vjp(self, outputs: Tensor, u: Tensor) -> Tensor:
        """``J^T u`` as a flat vector."""
        params = list(self.network.parameters.values())
        grads = torch.autograd.grad(outputs, params, u, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else dense(g) for g, p in zip(grads, params)]
        return torch.cat([g.flatten() for g in whole])

    def _run(self, batch: Batch, parameters: dict[str, Tensor], mode: ReverseConventions) -> Tensor:
        """The outputs with other tensors in the place of the parameters; a user's function may call the model
        anyhow.
        """
        with exchanged(self.network.model, parameters):
            return self.network.run(batch, mode)


_RIGHT: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()

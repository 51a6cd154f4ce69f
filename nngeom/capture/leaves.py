"""Which tensors stand for the parameters of a model in one forward pass.

Mostly the parameters themselves. Modules that exchange their parameters while they run (``fully_shard`` puts whole ones
in the place of a process's parts) show others to the operations, and it is in these that the pass is differentiated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nngeom.capture.arguments import tensors
from nngeom.capture.network import Batch, Network
from nngeom.core.errors import CoverageError


class Leaves:
    """The leaves of one pass, found as they turn up.

    A parameter that is none of those registered before the pass is looked for in the modules, each time anew until it
    is there: an exchange may be half done.
    """

    def __init__(self, network: Network) -> None:
        self.tensors: dict[str, Tensor] = dict(network.parameters)
        self.names: dict[int, str] = dict(network.ids)
        self._network, self._registered = network, network.registered
        self._others: dict[int, Tensor] = {}  # exchanged for registered ones that are not selected; held, as ids are
        self._found: list[Tensor] = []  # all that stood for selected ones, held likewise

    def name(self, x: Tensor) -> str | None:
        """The name of the selected parameter that ``x`` stands for."""
        known = self.names.get(id(x))
        if known is not None or not x.requires_grad or not _is_leaf(x) or not isinstance(x, nn.Parameter):
            return known
        if id(x) in self._registered or id(x) in self._others:
            return None
        self._look(x)
        return self.names.get(id(x))

    def _look(self, x: Tensor) -> None:
        named = dict(self._network.model.named_parameters(remove_duplicate=False))
        for name in self._network.parameters:
            now = named.get(name)
            if now is not None and id(now) not in self.names and now.shape == self.tensors[name].shape:
                self.names[id(now)], self.tensors[name] = name, now
                self._found.append(now)
        if id(x) not in self.names and any(p is x for p in named.values()):
            self._others[id(x)] = x

    @property
    def registered(self) -> frozenset[int]:
        """Ids of all parameters of the model, and of what was seen to stand for them."""
        return self._registered | self.names.keys() | self._others.keys()

    @property
    def exchanged(self) -> bool:
        """Whether some parameter is not its own leaf."""
        return any(self.tensors[name] is not p for name, p in self._network.parameters.items())

    def require_own(self) -> None:
        """Raise :class:`CoverageError` where some parameter is not its own leaf."""
        names = [name for name, p in self._network.parameters.items() if self.tensors[name] is not p]
        if names:
            raise CoverageError(
                f"the model exchanges the parameters {names[:4]}{'...' if len(names) > 4 else ''} for other tensors "
                "while it runs; expected its own here: matrices and kernels made of rows are right of both (PMatDense, "
                "PMatKFAC, FMatDense, ...), products and second derivatives need parameters that stay in their place"
            )

    def of_a_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The outputs of another pass of the model, on ``batch``, and the leaves of that pass in order.

        Where no parameter was exchanged before, none is looked for.
        """
        if not self.exchanged:
            return self._network.run(batch), list(self._network.parameters.values())
        watched = Leaves(self._network)
        with _Watched(watched):
            outputs = self._network.run(batch)
        return outputs, list(watched.tensors.values())


def _is_leaf(x: Tensor) -> bool:
    try:
        return x.is_leaf
    except RuntimeError:  # a view that was written in place where gradients are not recorded
        return False


class _Watched(TorchFunctionMode):
    """Shows what calls are given to some leaves."""

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        self.leaves = leaves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tensors(args, kwargs):
            self.leaves.name(x)
        return func(*args, **(kwargs or {}))

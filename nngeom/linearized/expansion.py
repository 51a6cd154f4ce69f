"""A copy of a model that remembers where it started: the common ground of linearised and alpha-scaled models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from nngeom.capture.exchanged import exchanged
from nngeom.capture.remedies import require_whole
from nngeom.core.errors import ArgumentTypeError, ModeError, OutputError
from nngeom.layers.refuse import REFUSALS
from nngeom.space.collection import LayerCollection, unwrap
from nngeom.space.pvector import PVector
from nngeom.space.walk import named_modules


class Expansion(nn.Module):
    """A network around the parameters ``w0`` it had at construction; subclasses say what becomes of ``f`` and ``f0``.

    The given model is copied and left alone. ``parameters()`` are the trainable parameters ``w`` of the copy
    (``self.model``), in the model's order, starting at ``w0``; frozen parameters become buffers, and ``w0`` is kept in
    buffers too, so that ``state_dict()`` holds everything. Modules in training mode whose outputs depend on the batch
    or on chance (batch normalisation, dropout) raise :class:`ModeError`: call ``.eval()`` on this module; the scale and
    shift of a batch normalisation are ordinary parameters then.

    Raises :class:`CollectionError` for a model without trainable parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        model = unwrap(model)
        self.layer_collection = LayerCollection.from_model(model)
        require_whole(named_modules(model), self.layer_collection.parameters(model), parts=False)
        _require_frozen_statistics(model, type(self).__name__)
        self.model = copy.deepcopy(model)
        self.training = model.training
        _freeze_as_buffers(self.model)
        self.origin = nn.Module()
        for name, p in self._weights().items():
            p.grad = None
            self.origin.register_buffer(name.replace(".", "/"), p.detach().clone())

    def _weights(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self.layer_collection.names}

    def _start(self) -> dict[str, Tensor]:
        return {name: self.origin.get_buffer(name.replace(".", "/")) for name in self.layer_collection.names}

    def _at_start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``f0``: the network at ``w0``; differentiable in the inputs only."""
        with Refusing(), exchanged(self.model, self._start()):
            return as_outputs(self.model(*args, **kwargs))

    @property
    def delta(self) -> PVector:
        """``w - w0``, detached, a vector of the model's parameters."""
        return PVector.from_dict(self.layer_collection, self._displacement(detach=True))

    def _displacement(self, *, detach: bool = False) -> dict[str, Tensor]:
        start = self._start()
        return {name: (w.detach() if detach else w) - start[name] for name, w in self._weights().items()}

    def reference(self) -> nn.Module:
        """A copy of the network as it was at the start, with the parameters ``w0``."""
        model = copy.deepcopy(self.model)
        named = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, w0 in self._start().items():
                named[name].copy_(w0)
        return model


class Refusing(TorchFunctionMode):
    """Raises :class:`ModeError` where a call mixes the examples of a batch or draws at random."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refusal = REFUSALS.get(func)
        if refusal is not None:
            refusal(*args, **kwargs)
        return func(*args, **kwargs)


def as_outputs(out: Any) -> Tensor:
    """The tensor of outputs, or the ``.logits`` of what the model returned."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise OutputError(
            f"the model returned {type(out).__name__}; expected a tensor, or an object with a tensor .logits: "
            "wrap the model"
        )
    return logits


def _require_frozen_statistics(model: nn.Module, what: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ModeError(
                f"{what} got a model whose batch normalisation {name!r} uses the statistics of the batch; "
                "expected frozen statistics, "
                "because f and f0 would be different functions of the batch and its running averages would be "
                "updated by both: call model.eval() first"
            )


def _freeze_as_buffers(model: nn.Module) -> None:
    """Make buffers of the parameters that do not train."""
    for owner, name, p in list(_parameters(model)):
        if not p.requires_grad:
            del owner._parameters[name]
            owner.register_buffer(name, p.detach())


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield module, name, p

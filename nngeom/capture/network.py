"""What is differentiated: a model, the function of its outputs, the selected parameters, and the batches."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture import remedies
from nngeom.capture.batch import Batch as Batch
from nngeom.capture.batch import leading_size as leading_size
from nngeom.capture.batch import move
from nngeom.capture.batch import take as take
from nngeom.capture.compiled import as_written
from nngeom.capture.fused import dense_gradients
from nngeom.capture.gathered import require_gathered, sharded_modules
from nngeom.capture.in_step import in_step, require_same_batch
from nngeom.capture.in_turn import used, value
from nngeom.capture.loaders import as_batches as as_batches
from nngeom.capture.made_of import require_data
from nngeom.capture.measuring import measuring
from nngeom.capture.outputs import called, checked
from nngeom.capture.program import Looks
from nngeom.capture.untouched import Watch
from nngeom.core.errors import (
    ArgumentTypeError,
    DeviceError,
    LoaderError,
    NonFiniteError,
    UnsupportedError,
)
from nngeom.core.whole import in_parts
from nngeom.space.collection import LayerCollection, unwrap
from nngeom.space.walk import Places

RUNNING = threading.RLock()  # models run one at a time: a forward-mode pass puts other tensors into them meanwhile


@dataclass(frozen=True)
class Network:
    """A model with everything needed to run it on a batch and to name its parameters."""

    model: nn.Module
    collection: LayerCollection
    function: Callable[..., Tensor] | None
    parameters: dict[str, nn.Parameter]
    device: torch.device
    dtype: torch.dtype
    places: Places  # of all modules and parameters of the model, when this was built
    distributed: Tensor | None = None  # a parameter that is a distributed tensor while the model runs, if there is one
    looks: Looks = field(default_factory=Looks, repr=False)

    @staticmethod
    def build(
        model: nn.Module,
        function: Callable[..., Tensor] | None,
        collection: LayerCollection | None,
        *,
        parts: bool = False,
    ) -> Network:
        """Checked: raises on a model without parameters, on several devices, a collection of another model, or, unless
        these ``parts`` are looked after, parameters of which a process holds parts.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        if function is not None and not callable(function):
            raise ArgumentTypeError(
                f"function is {function!r}; expected a callable returning the outputs (n, c), or None"
            )
        model = unwrap(model)
        places = Places(model)
        every = places.parameters
        lc = collection if collection is not None else LayerCollection.whole(model, every)
        if not isinstance(lc, LayerCollection):
            raise ArgumentTypeError(
                f"layer_collection is {type(lc).__name__}; expected LayerCollection.from_model(model, ...)"
            )
        parameters = lc.live(every)
        remedies.require_whole(places.named, parameters, parts=parts)
        devices = {p.device for p in parameters.values()}
        if len(devices) != 1:
            raise DeviceError(
                f"the selected parameters are on several devices, {sorted(map(str, devices))}; expected one: "
                "move the model with model.to(device)"
            )
        dtype = functools.reduce(torch.promote_types, {p.dtype for p in parameters.values()})
        distributed = next((p for p in every.values() if in_parts(p)), None)
        return Network(model, lc, function, parameters, devices.pop(), dtype, places=places, distributed=distributed)

    @functools.cached_property
    def ids(self) -> dict[int, str]:
        """Names of the selected parameters by the id of the object."""
        return {id(p): name for name, p in self.parameters.items()}

    @property
    def every(self) -> dict[str, nn.Parameter]:
        """All parameters of the model, by all their names."""
        return self.places.parameters

    @functools.cached_property
    def registered(self) -> frozenset[int]:
        """Ids of all parameters of the model."""
        return frozenset(map(id, self.every.values()))

    @functools.cached_property
    def watch(self) -> Watch:
        """Of what forward passes leave behind."""
        return Watch(self.model, self.places.modules, self.every, self.device)

    @property
    def hooked(self) -> set[str]:
        """Selected parameters that run functions on their gradients."""
        return {name for name, p in self.parameters.items() if p._backward_hooks}

    def layer_of(self, name: str) -> str:
        """The layer of a parameter."""
        return self.collection.layers[self.collection.names.index(name)]

    def only(self, names: tuple[str, ...]) -> Network:
        """The same with some of its parameters selected, ``names``."""
        collection = self.collection.only(names)
        parameters = {name: self.parameters[name] for name in collection.names}
        dtype = functools.reduce(torch.promote_types, {p.dtype for p in parameters.values()})
        return replace(self, collection=collection, parameters=parameters, dtype=dtype)

    # -- batches -------------------------------------------------------------------------------------------------------

    def batches(self, loader: Any, *, may_be_empty: bool = False) -> Iterator[Batch]:
        """The batches of a loader on the model's device; raises :class:`LoaderError` without any, unless ``may_be``."""
        empty = True
        for batch in as_batches(loader):
            empty = False
            require_data(batch, self.ids)
            yield move(batch, self.device)
        if empty and not may_be_empty:
            raise LoaderError(
                "the loader is empty: expected at least one batch (a used-up generator? pass a list of its batches)"
            )

    def run(self, batch: Batch, mode: AbstractContextManager[Any] | None = None) -> Tensor:
        """The outputs ``(n, ...)`` of one batch, checked; buffers and random states are as they were before.

        ``mode``: what the model runs within; nothing of ours does.
        """
        self._require_gathered()
        if self.distributed is not None:
            require_same_batch(batch, self.distributed)
        with RUNNING, self.watch.undone():
            outputs = self._outputs(batch, mode or contextlib.nullcontext())
        self._require_gathered()
        return outputs if self.distributed is None else in_step(outputs, self.distributed)

    def value(self, parameter: Tensor) -> Tensor:
        """The numbers of a ``parameter`` of the model, whole, to be read now."""
        return value(self.model, parameter)

    def require_whole(self, what: str) -> None:
        """Raise :class:`UnsupportedError`, which calls it ``what``, where parameters are distributed tensors while the
        model runs.
        """
        if self.distributed is not None:
            raise UnsupportedError(
                f"{what} of a model whose parameters are distributed tensors (tensor parallelism): torch's second "
                "derivatives through these are not right; use a measure of first derivatives (GGN, FIM, a kernel "
                "without differentiable=True), or a model that is whole, or under fully_shard alone"
            )

    def _require_gathered(self) -> None:
        if self._gathers:
            require_gathered(self.model, self.parameters)

    @functools.cached_property
    def _gathers(self) -> bool:
        """Whether the parameters are whole only within a call."""
        return bool(sharded_modules(self.model))

    def _outputs(self, batch: Batch, mode: AbstractContextManager[Any]) -> Tensor:
        with as_written(), measuring(), used(self.model), mode, dense_gradients(self.places.modules):
            try:
                outputs = self.function(*_unpack(batch)) if self.function is not None else called(self.model, batch)
            except (RuntimeError, TypeError) as error:
                remedy = remedies.of_a_call(error, batch, self.parameters, self.function)
                if remedy is None:
                    raise
                raise remedy from error
        return checked(outputs, batch, "model" if self.function is None else "function")


def _unpack(batch: Batch) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def targets(batch: Batch) -> Any:
    """The targets of a batch: the second of a pair, or ``batch["labels"]``; ``None`` where there are none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def require_targets(batch: Batch) -> Any:
    """The targets of a batch; raises :class:`LoaderError` where there are none."""
    y = targets(batch)
    if y is None:
        raise LoaderError(
            f"this measure needs targets but the batch is {_describe(batch)}; expected (inputs, targets) or a "
            "dict with 'labels'"
        )
    return y


def _describe(batch: Batch) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a dict with {list(batch)}"
    return f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__


def require_finite(x: Tensor, what: str, batch_index: int) -> None:
    """Raise :class:`NonFiniteError` naming the examples (first axis) of ``x`` that are not finite."""
    if math.isfinite(x.sum().item()):
        return
    bad = (
        (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        if x.ndim > 1
        else (~torch.isfinite(x)).nonzero().flatten().tolist()
    )
    if bad:
        raise NonFiniteError(
            f"{what} of batch {batch_index} contain NaN or infinity for examples "
            f"{bad[:8]}{'...' if len(bad) > 8 else ''}; "
            "check those inputs and the model's parameters"
        )


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients are recorded, and forward mode works, whatever the caller switched off: a ``torch.autograd.Function``
    in its forward pass both.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield

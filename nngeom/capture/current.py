"""Whether a model still has the parameters that an object was built for."""

from __future__ import annotations

import functools

import torch

from nngeom.capture.network import Network
from nngeom.core.errors import CollectionError
from nngeom.space.walk import named_parameters


def require_current(network: Network) -> None:
    """Raise :class:`CollectionError` where some of the parameters of a ``network`` are frozen, or no longer those of
    its model.

    Products with a matrix that holds the model would leave them out.
    """
    parameters = network.parameters
    if network.places.are_current():  # and then these are those of the model
        if all([p.requires_grad for p in parameters.values()]):
            return
        exchanged = []
    else:
        now = named_parameters(network.model)
        exchanged = [name for name, p in parameters.items() if now.get(name) is not p]
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if exchanged or frozen:
        what = f"other parameters {exchanged[:4]}" if exchanged else f"frozen parameters {frozen[:4]}"
        raise CollectionError(
            f"the model has {what} since this was built; expected those that it had then (their values may change): "
            "build it again"
        )


def require_converted_before(network: Network) -> None:
    """Raise :class:`CollectionError` where the parameters of a ``network`` have another dtype, or lie on another
    device, than when it was built: numbers that were kept since have those of then.
    """
    if all([p.dtype is network.dtype and p.device == network.device for p in network.parameters.values()]):
        return
    dtypes, devices = zip(*{(p.dtype, p.device) for p in network.parameters.values()})
    dtype = functools.reduce(torch.promote_types, dtypes)
    if dtype != network.dtype or any(device != network.device for device in devices):
        raise CollectionError(
            f"the parameters are {dtype} on {devices[0]} now, and were {network.dtype} on {network.device} when this "
            "was built: convert and move a model before; or build it again, and load the state_dict() of this one"
        )

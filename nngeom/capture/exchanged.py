"""Other tensors in the place of a model's parameters, for as long as a pass takes.

``torch.func.functional_call`` does this by name, and puts what it found under each name back in the same order: of a
module that has two names the second name then finds the exchanged tensor, and that is what stays in the model (torch
2.13). Here every place is visited once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def exchanged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: ``tensors`` in the place of the parameters of these names, wherever the ``model`` holds them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    of = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = [(m._parameters, key) for m in model.modules() for key, p in m._parameters.items() if id(p) in of]
    held = [place[key] for place, key in places]
    try:
        for place, key in places:
            place[key] = of[id(place[key])]  # type: ignore[assignment]
        yield
    finally:
        for (place, key), p in zip(places, held):
            place[key] = p

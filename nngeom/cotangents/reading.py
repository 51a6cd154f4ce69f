"""How a likelihood or a loss reads a batch: what it is for these outputs, and its targets."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from nngeom.capture.network import targets


class Reading:
    """Both read targets where batches have them; those that need more of a batch say so here."""

    def __repr__(self) -> str:
        inner = getattr(self, "categorical", None)
        settings = {
            name: getattr(self, name, getattr(inner, name, ...)) for name in inspect.signature(type(self)).parameters
        }
        told = [f"{name}={_told(x)}" for name, x in settings.items() if x is not ... and not isinstance(x, nn.Module)]
        return f"{type(self).__name__}({', '.join(told)})"

    def resolved(self, outputs: Tensor, batch: Any) -> Any:
        """This object, or what it stands for with these ``outputs (n, *shape)`` of this ``batch``."""
        return self

    def targets_of(self, outputs: Tensor, batch: Any) -> Any:
        """The targets of a ``batch``, in the form that the other methods take for these ``outputs``; ``None`` where
        there are none.
        """
        return targets(batch)


def _told(value: Any) -> str:
    """A setting in a line: numbers as they are, of tensors with several the shape."""
    if isinstance(value, Tensor):
        return f"{value.item():g}" if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"
    return repr(value)

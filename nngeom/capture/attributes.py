"""Plain attributes of modules, put back after every pass: what a model carries on from one call to the next.

A hidden state, a counter, a weight that is computed once and kept: with these put back every pass starts from the same
model. Whether the next call would have depended on them is asked once, by one that finds them as the last left them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ModeError

Values = dict[str, Any]


class Attributes:
    """What the ``modules`` hold beside parameters, buffers and modules, around the passes of a model.

    ``left``: what the last pass left, by the number of the module; ``idle``: that the next call does not depend on such
    things was seen.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._places: list[Values] = [m.__dict__ for m in modules]
        self.left: dict[int, Values] = {}
        self.idle = False

    def hold(self) -> list[Values]:
        """All values, for :meth:`put_back`."""
        return [place.copy() for place in self._places]

    def put_back(self, held: list[Values]) -> None:
        """Make all values those ``held`` before, and keep what they had become."""
        changed = [
            j
            for j, (now, before) in enumerate(zip(self._places, held))
            if len(now) != len(before) or not all(map(is_, now.values(), before.values()))
        ]
        self.left = {j: self._places[j].copy() for j in changed}
        for j in changed:
            _write(self._places[j], held[j])

    def require_idle(self, run: Callable[[], Tensor], outputs: Tensor, name: Callable[[int, str], str]) -> None:
        """Raise :class:`ModeError` where ``run``, from what the last pass left, gives other ``outputs``.

        ``name``: of an attribute, from the number of its module and its key.
        """
        left, held = self.left, self.hold()
        if self.idle or not left:
            return
        try:
            for j, values in left.items():
                _write(self._places[j], values)
            again = run().detach()
        finally:
            for j in left:
                _write(self._places[j], held[j])
        if not _same(again, outputs):
            names = [name(j, key) for j, now in left.items() for key in _changed(now, held[j])]
            raise ModeError(
                f"the forward pass leaves the attributes {names[:4]} behind, and the next one depends on them (a hidden "
                "state that is carried on, a counter, a memory), so that it is of another model: set them anew in every "
                "call, or pass function= that does. They were put back"
            )
        self.idle = True


def _changed(now: Values, before: Values) -> list[str]:
    return [key for key in {**before, **now} if now.get(key) is not before.get(key)]


def _write(place: Values, values: Values) -> None:
    for key in place.keys() - values.keys():
        del place[key]
    place.update(values)


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    most = float(y.abs().nan_to_num(posinf=0.0).max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * most, equal_nan=True)

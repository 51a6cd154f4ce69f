"""Plain attributes of modules, put back after every pass: what a model carries on from one call to the next.

A hidden state, a weight that is computed once and kept: with these put back every pass starts from the same model.
Whether the next call would have depended on them is asked once, by one that finds them as the last left them.
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
    """What ``modules`` hold beside parameters, buffers and modules, around the passes of a model: all that those hold
    which are not torch's own, and the modes of all.

    ``left``: what the last pass found and left, by the number of the module in ``modules``; ``carried``: the names of
    numbers that passes changed, by module; ``idle``: that the next call does not depend on such things was seen.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = [m for m in modules if not type(m).__module__.startswith("torch.nn.")]
        self._all, self._places = modules, [m.__dict__ for m in self.modules]
        self.left: dict[int, tuple[Values, Values]] = {}
        self.carried: dict[nn.Module, set[str]] = {}
        self.idle = False

    def hold(self) -> tuple[list[Values], list[bool]]:
        """All values and modes, for :meth:`put_back`."""
        return [place.copy() for place in self._places], [m.training for m in self._all]

    def put_back(self, held: tuple[list[Values], list[bool]]) -> None:
        """Make all those ``held`` before, but for numbers, as who counts calls wants to see them counted."""
        values, modes = held
        self.left = {
            j: (before, now.copy())
            for j, (now, before) in enumerate(zip(self._places, values))
            if len(now) != len(before) or not all(map(is_, now.values(), before.values()))
        }
        for module, mode in zip(self._all, modes):
            if module.training is not mode:
                module.training = mode
        for j, (before, after) in self.left.items():
            numbers = {key: x for key, x in after.items() if type(x) in (int, float)}
            _write(self._places[j], {**before, **numbers})
            counted = {key for key, x in numbers.items() if before.get(key) is not x}
            self.carried.setdefault(self.modules[j], set()).update(counted)

    def require_idle(self, run: Callable[[], Tensor], outputs: Tensor, name: Callable[[nn.Module, str], str]) -> None:
        """Raise :class:`ModeError` where ``run``, from what the last pass left, gives other ``outputs``.

        ``name``: of an attribute, from its module and its key.
        """
        if self.idle or not self.left:
            return
        left, (now, _) = self.left, self.hold()
        try:
            for j, (_, after) in left.items():
                _write(self._places[j], after)
            again = run().detach()
        finally:
            for j in left:
                _write(self._places[j], now[j])
        if not _same(again, outputs):
            for j, (before, _) in left.items():
                _write(self._places[j], before)
            names = [
                name(self.modules[j], key) for j, (before, after) in left.items() for key in _changed(after, before)
            ]
            raise ModeError(
                f"the forward pass leaves the attributes {names[:4]} behind, and the next one depends on them (a "
                "hidden state that is carried on, a counter, a memory), so that it is of another model: set them anew "
                "in every call, or pass function= that does. They were put back"
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

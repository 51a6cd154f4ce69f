"""Parameters that a forward pass writes: they are put back, and the pass is refused.

A weight that is clipped, normalised or averaged inside of ``forward`` is another one afterwards. Calls that may write
are seen before they do, so that only models which make such calls pay for copies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.arguments import tensors
from nngeom.capture.in_turn import whole_of
from nngeom.layers.writing import WRITERS

_DATA = "data"


@functools.cache
def may_write(func: Any) -> bool:
    """Whether a call may write into its first argument, or gives a tensor away that can be written unseen."""
    if func in WRITERS:
        return True
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", "") == _DATA
    inside = name.startswith("__i") and name not in ("__init__", "__invert__", "__index__", "__int__")
    return name == "__setitem__" or inside or (name.endswith("_") and not name.endswith("__"))


class Overwritten:
    """Copies of the parameters of a model, ``every`` one by its name, that calls may write.

    One that is whole in turn has other memory each time, which is kept until the pass is over and then not put back: it
    is a copy of what processes hold in parts.
    """

    def __init__(self, every: Mapping[str, nn.Parameter]) -> None:
        self._every = every
        self._kept: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._in_turn: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _storages(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, p in self._every.items():
            at = _address(p)
            if at:
                found.setdefault(at, []).append(name)
        return found

    def keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copies of parameters that the call ``func(*args, **kwargs)`` may write."""
        writer = WRITERS.get(func)
        written = tensors(args[:1] if writer is None else (writer(*args, **kwargs),), {"out": kwargs.get("out")})
        with torch._C.DisableTorchFunction():
            for x in written:
                whole = whole_of(x)
                if whole is None:
                    self._keep_at(_address(x))
                else:
                    self._keep_whole(whole)

    def _keep_whole(self, whole: Tensor) -> None:
        for name in [name for name, p in self._every.items() if p is whole]:
            if (name, _address(whole)) not in self._in_turn:
                self._in_turn[name, _address(whole)] = whole.data, whole.detach().clone()

    def _keep_at(self, address: int) -> None:
        for name in self._storages.get(address, ()):
            p = self._every[name]
            if name not in self._kept and _address(p) == address:  # and not somewhere else by now
                self._kept[name] = p, p.data, p.detach().clone()

    def put_back(self) -> list[str]:
        """Names of the parameters that are not what they were; they are put back."""
        changed = [name for (name, _), (data, values) in self._in_turn.items() if not torch.equal(data, values)]
        self._in_turn.clear()
        for name, (p, data, values) in self._kept.items():
            moved = p.data_ptr() != data.data_ptr() or p.shape != values.shape
            if moved:
                p.data = data
            if not torch.equal(data, values) or moved:
                changed.append(name)
                data.copy_(values)
        self._kept.clear()
        return changed


def _address(x: Tensor) -> int:
    """Where the memory of a tensor begins; zero where it has none of its own."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, AttributeError):
        return 0

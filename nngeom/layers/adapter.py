"""How an operation uses its parameters: the registry of adapters.

An adapter is one function, registered for the torch functions it understands and called with their own arguments. It
returns a :class:`Use`: which (parts of) parameters were used as which matrix, and how inputs and output gradients are
read as ``a [*lead, s, i]`` and ``g [*lead, s, o]``. ``lead`` are the axes among which the examples lie; which of them
it is, is found out later (:mod:`nngeom.pullback.axes`), so that no adapter has to guess.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nngeom.layers.call import Call, NotStructured
from nngeom.layers.use import Slot, Use

__all__ = ["ADAPTERS", "Call", "NotStructured", "Slot", "Use", "adapts"]

Adapter = Callable[..., Use | None]
ADAPTERS: dict[Any, Adapter] = {}


def adapts(*functions: Any) -> Callable[[Adapter], Adapter]:
    """Register an adapter for torch ``functions``, at its definition.

    A use explains each parameter that was given to the call once, where it was given: of ``F.linear(w, w)`` it explains
    one of two, so that the call has no structure.
    """

    def register(adapter: Adapter) -> Adapter:
        @functools.wraps(adapter)
        def explained(call: Call, *args: Any, **kwargs: Any) -> Use | None:
            use = adapter(call, *args, **kwargs)
            return use if use is None or call.given == len(use.slots) else None

        for function in functions:
            ADAPTERS[function] = explained
        return adapter

    return register

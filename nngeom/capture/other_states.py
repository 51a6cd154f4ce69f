"""The random states of Python and NumPy: whether they moved, and putting them back.

They are asked around the first pass of every measure, so that asking must be cheap: NumPy makes a copy of its generator
for every state that it gives (65 microseconds), which may be read from its memory instead (one).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

WORDS = 624  # of a Mersenne twister, each of four bytes, and a place among them


class OtherStates:
    """The states at the time when this was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._generator, self._numpy = _generator_of_numpy(), _state_of_numpy()

    def put_back(self) -> str:
        """The libraries whose state is not what it was, which is put back; empty where there is none."""
        changed = []
        if random.getstate() != self._python:
            random.setstate(self._python)
            changed.append("Python")
        if _generator_of_numpy() is not self._generator or not _same(_state_of_numpy(), self._numpy):
            np.random.set_state(_as_state(self._numpy))
            changed.append("NumPy")
        return " and ".join(changed)


def _generator_of_numpy() -> Any:
    """The bit generator behind the functions of ``numpy.random``; ``None`` in versions that do not tell."""
    get = getattr(np.random, "get_bit_generator", None)
    return None if get is None else get()


def _state_of_numpy() -> Any:
    """Its state: as bytes of its memory where that is known to hold it, else as NumPy gives it."""
    generator = _generator_of_numpy()
    if type(generator) is np.random.MT19937 and _memory_is_state():
        return _bytes(generator)
    return np.random.get_state()


def _bytes(generator: Any) -> bytes:
    return ctypes.string_at(generator.ctypes.state_address, 4 * WORDS + 4)


@functools.cache
def _memory_is_state() -> bool:
    """Whether the memory of a Mersenne twister holds its words and then the place, as it is read here."""
    generator = np.random.MT19937(1)
    np.random.Generator(generator).integers(9, size=7)
    state: Any = generator.state["state"]
    return _bytes(generator) == state["key"].astype(np.uint32).tobytes() + np.int32(state["pos"]).tobytes()


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, bytes) or isinstance(y, bytes):
        return bool(x == y)
    return x[2] == y[2] and np.array_equal(x[1], y[1])


def _as_state(x: Any) -> Any:
    """What ``numpy.random.set_state`` takes."""
    if not isinstance(x, bytes):
        return x
    words = np.frombuffer(x, np.uint32)
    return "MT19937", words[:WORDS], int(words[WORDS])


class OwnGenerators:
    """The generators of Python and NumPy that ``modules`` hold as attributes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        kinds = random.Random, np.random.Generator, np.random.RandomState
        held = {id(x): x for m in modules for x in m.__dict__.values() if isinstance(x, kinds)}
        self._held: list[Any] = [*held.values()]

    def states(self) -> list[Any]:
        """One each."""
        return [copy.deepcopy(_state(x)) for x in self._held]

    def put_back(self, states: list[Any]) -> str:
        """The library of one whose state is not what it was, all of which are put back; empty where there is none."""
        moved = [(x, state) for x, state in zip(self._held, states) if repr(_state(x)) != repr(state)]
        for x, state in moved:
            if isinstance(x, random.Random):
                x.setstate(state)
            else:
                _bits(x).state = state
        return next(("Python" if isinstance(x, random.Random) else "NumPy" for x, _ in moved), "")


def _bits(x: Any) -> Any:
    return x.bit_generator if isinstance(x, np.random.Generator) else x._bit_generator


def _state(x: Any) -> Any:
    return x.getstate() if isinstance(x, random.Random) else _bits(x).state

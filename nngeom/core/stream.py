"""Random numbers keyed by example: neither batch size nor the number of processes changes a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import described


@dataclass(frozen=True)
class Numbers:
    """The numbers of examples that draws are keyed by: ``offset`` plus the running index, or the user's own,
    ``index(batch) -> (n,)``.
    """

    offset: int = 0
    index: Callable[[Any], Any] | None = None

    def of(self, batch: Any, start: int, n: int) -> Tensor:
        """Those of a ``batch`` of ``n`` examples whose first has the running index ``start``.

        Raises :class:`ArgumentTypeError` or :class:`ArgumentError` for what ``index`` returns but whole numbers, one an
        example.
        """
        if self.index is None:
            return torch.arange(self.offset + start, self.offset + start + n, device="cpu")
        given = self.index(batch)
        try:
            numbers = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            numbers = None
        if numbers is None or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool:
            kind = type(given).__name__ if numbers is None else str(numbers.dtype)
            raise ArgumentTypeError(f"index returned {kind}; expected whole numbers (n,), the examples' own")
        if tuple(numbers.shape) != (n,):
            raise ArgumentError(f"index returned {tuple(numbers.shape)}; expected ({n},), a number for each example")
        return numbers.long()


RUNNING = Numbers()


class Stream:
    """Uniform numbers in (0, 1) that depend on (seed, number of the example, sample, draw) and nothing else.

    A counter-based generator: every number is the splitmix64 hash of its own key. ``numbers (n,)``: of the examples.
    """

    def __init__(self, seed: int, numbers: Tensor, sample: int, device: torch.device) -> None:
        self._index = numbers.to(device)
        self._base = _mix(_mix(torch.tensor(seed, device=device)) + sample)
        self._drawn = 0

    def __call__(self, *shape: int) -> Tensor:
        """``(n, *shape)``, float64."""
        bits = self._bits(torch.Size(shape).numel())
        return ((_shift(bits, 11).double() + 0.5) * 2.0**-53).view(len(self._index), *shape)

    def signs(self, *shape: int) -> Tensor:
        """Random signs ``(n, *shape)``, int8: 64 of one draw."""
        size = torch.Size(shape).numel()
        octets = self._bits(-(-size // 64)).view(torch.uint8).unsqueeze(-1)
        ones = (octets >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
        return (1 - 2 * ones.flatten(1)[:, :size].to(torch.int8)).view(len(self._index), *shape)

    def _bits(self, size: int) -> Tensor:
        counter = torch.arange(self._drawn, self._drawn + size, device=self._index.device)
        self._drawn += size
        return _mix(_mix(self._base + self._index).unsqueeze(1) + counter)


def seed_of(generator: torch.Generator | None) -> int:
    """One integer from a generator (the global one when ``None``)."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(f"generator is {described(generator)}; expected a torch.Generator")
    device = generator.device if generator is not None else torch.device("cpu")
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors with wrap-around."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)

"""What vectors of parameter space and of function space do entry by entry, and what batches of them do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import require_callable
from nngeom.core.hand import InHand

V = TypeVar("V", bound="Elementwise")


def combined(f: Callable[[Tensor, Any], Tensor], x: Tensor, y: Any, axes: int) -> Tensor:
    """``f`` of two batches of entries, whose last ``axes`` are those of one vector; raises :class:`ArgumentError` where
    the batches differ.
    """
    try:
        return f(x, y)
    except RuntimeError as error:
        batches = tuple(x.shape[: x.ndim - axes]), tuple(y.shape[: y.ndim - axes])
        if all(a == b or 1 in (a, b) for a, b in zip(*map(reversed, batches))):
            raise
        raise ArgumentError(
            f"the batches of two vectors are {batches[0]} and {batches[1]}; expected equal ones, or one vector for all"
        ) from error


class Elementwise(InHand, ABC):
    """Functions of the entries of a vector with a ``tensor``, and the inner product as an operator."""

    tensor: Tensor

    @abstractmethod
    def like(self: V, tensor: Tensor) -> V:
        """A vector of the same space with the entries ``tensor``."""

    @abstractmethod
    def dot(self, other: Any) -> Tensor:
        """The inner product with ``other``, ``(*batch)``."""

    def apply(self: V, f: Callable[[Tensor], Tensor]) -> V:
        """``f`` of the entries, a function of the tensor ``(*batch, ...)`` that returns one of the same shape."""
        require_callable(f, "the function of the entries")
        out = f(self.tensor)
        if not isinstance(out, Tensor) or out.shape != self.tensor.shape:
            given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ArgumentError(f"the function returned {given}; expected a tensor {tuple(self.tensor.shape)}")
        return self.like(out)

    def __matmul__(self, other: Any) -> Tensor:
        return self.dot(other)

    def __abs__(self: V) -> V:
        return self.like(self.tensor.abs())

    def __pow__(self: V, p: Any) -> V:
        if not isinstance(p, (int, float)) and not (isinstance(p, Tensor) and p.ndim == 0):
            raise ArgumentTypeError(f"the power is {type(p).__name__}; expected a number")
        return self.like(torch.pow(self.tensor, p))


class Batched(Elementwise):
    """Leading axes as a sequence of vectors."""

    @abstractmethod
    def named(self, name: str) -> Tensor:
        """The entries of the part ``name``."""

    @abstractmethod
    def to_dict(self) -> dict[str, Tensor]:
        """The parts by name, with all axes of the batch."""

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """The shape and the norm of every part, one line each."""
        parts = self.to_dict().items()
        return ["part", "shape", "norm"], [[n, "x".join(map(str, x.shape)) or "1", f"{x.norm():.3g}"] for n, x in parts]

    @overload
    def __getitem__(self, index: str) -> Tensor: ...
    @overload
    def __getitem__(self: V, index: Any) -> V: ...
    def __getitem__(self, index: Any) -> Any:
        return self.named(index) if isinstance(index, str) else self.picked(index)

    def picked(self, index: Any) -> Any:
        """The vectors of a batch at ``index``: an integer, a slice, a tuple or tensor of these, for its axes."""
        key = index if isinstance(index, tuple) else (index,)
        entries = (slice(None),) if any(k is Ellipsis for k in key) else (Ellipsis, slice(None))
        try:
            return self.like(self.tensor[key + entries])
        except (IndexError, TypeError) as error:
            raise ArgumentError(
                f"cannot take {index!r} of vectors {tuple(self.tensor.shape)}, the last axis their entries: {error}; "
                "expected indices of the batch, or the name of a parameter"
            ) from None

    def __len__(self) -> int:
        if self.tensor.ndim < 2:
            raise ArgumentTypeError("a single vector has no length; .shape[-1] is the number of its entries")
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self.like(row) for row in self.tensor[: self.__len__()])

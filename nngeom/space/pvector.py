"""Vectors of parameter space."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, ArgumentTypeError, CollectionError
from nngeom.core.norms import vector_norm
from nngeom.core.whole import whole
from nngeom.space.collection import LayerCollection, unwrap
from nngeom.space.joined import joined, require_collection, sizes
from nngeom.space.operations import Batched, combined


@dataclass(frozen=True, eq=False)
class PVector(Batched):
    """A vector (or batch of vectors) over the parameters of a :class:`LayerCollection`, its ``layer_collection``.

    One internal form: the flat ``tensor (*batch, d)``, in the order of the collection.
    """

    layer_collection: LayerCollection
    tensor: Tensor

    def __post_init__(self) -> None:
        lc = self.layer_collection
        if not isinstance(lc, LayerCollection):
            raise ArgumentTypeError(f"expected PVector(layer_collection, tensor); the first is {type(lc).__name__}")
        d = lc.numel
        if not isinstance(self.tensor, Tensor) or self.tensor.ndim == 0 or self.tensor.shape[-1] != d:
            given = tuple(self.tensor.shape) if isinstance(self.tensor, Tensor) else type(self.tensor).__name__
            raise ArgumentError(f"a PVector of this collection has shape (*batch, {d}); got {given}")

    # -- construction --------------------------------------------------------------------------------------------------

    @staticmethod
    def from_model(model: nn.Module, layer_collection: LayerCollection | None = None, *, live: bool = False) -> PVector:
        """The parameters of ``model``, those of ``layer_collection`` only where it is given: a detached copy.

        Of parameters in parts over several processes the whole ones, on all of these, which call it together.
        ``live``: with their graph, so that what is computed from the vector has a gradient in the parameters. A penalty
        ``M.vTMv(w - w0)`` in a loss takes a live ``w`` and a detached ``w0``: of two copies it would be a constant.
        """
        lc = layer_collection or LayerCollection.from_model(model)
        return PVector.from_dict(lc, {n: whole(p if live else p.detach()) for n, p in lc.parameters(model).items()})

    @staticmethod
    def from_grad(model: nn.Module, layer_collection: LayerCollection | None = None) -> PVector:
        """A detached copy of the ``.grad`` of the parameters, of those in parts as :meth:`from_model`; raises
        :class:`ArgumentError` where one is ``None``.
        """
        lc = layer_collection or LayerCollection.from_model(model)
        params = lc.parameters(model)
        missing = [n for n, p in params.items() if p.grad is None]
        if missing:
            raise ArgumentError(
                f"parameters {missing[:4]} have no gradient; call loss.backward() first, or exclude them from "
                "the collection"
            )
        return PVector.from_dict(lc, {n: whole(p.grad.detach()) for n, p in params.items() if p.grad is not None})

    @staticmethod
    def from_flat(layer_collection: LayerCollection, tensor: Tensor) -> PVector:
        """From a flat ``tensor (*batch, d)``, in the order of ``layer_collection``; not copied."""
        return PVector(layer_collection, tensor)

    @staticmethod
    def from_dict(layer_collection: LayerCollection, tensors: Mapping[str, Tensor]) -> PVector:
        """From one tensor ``(*batch, *shape)`` a parameter of ``layer_collection``, ``tensors`` by name; copied."""
        return PVector(layer_collection, joined(require_collection(layer_collection), tensors))

    @staticmethod
    def zeros(
        layer_collection: LayerCollection, *batch: int, dtype: torch.dtype | None = None, device: Any = None
    ) -> PVector:
        """All zeros, ``(*batch, d)``, over ``layer_collection``; ``dtype`` and ``device`` are torch's defaults unless
        given.
        """
        return PVector(layer_collection, torch.zeros(sizes(layer_collection, batch), dtype=dtype, device=device))

    @staticmethod
    def randn(
        layer_collection: LayerCollection,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> PVector:
        """Independent standard normal entries, ``(*batch, d)``, over ``layer_collection``.

        ``generator``: torch's global one by default; ``dtype``: torch's default unless given; ``device``: that of the
        generator unless given.
        """
        device = device if device is not None else (generator.device if generator is not None else None)
        return PVector(
            layer_collection,
            torch.randn(sizes(layer_collection, batch), generator=generator, dtype=dtype, device=device),
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def flat(self) -> Tensor:
        """``(*batch, d)``."""
        return self.tensor

    def to_dict(self) -> dict[str, Tensor]:
        """``{name: (*batch, *shape)}``, views of the flat tensor."""
        return {name: self[name] for name in self.layer_collection.names}

    def like(self, tensor: Tensor) -> PVector:
        """The vector of the same parameters with the entries ``tensor (*batch, d)``."""
        return PVector(self.layer_collection, tensor)

    def named(self, name: str) -> Tensor:
        """The entries of the parameter ``name``, ``(*batch, *its shape)``."""
        table = self.layer_collection.offsets()
        if name not in table:
            raise CollectionError(f"no parameter {name!r} in this vector; it has {list(table)[:8]}")
        lo, shape = table[name]
        return self.tensor[..., lo : lo + math.prod(shape)].reshape((*self.batch_shape, *shape))

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions."""
        return self.tensor.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        """``(*batch, d)``."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the entries."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.tensor.device

    def __repr__(self) -> str:
        return (
            f"PVector(shape={tuple(self.shape)}, parameters={len(self.layer_collection)}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )

    # -- algebra -------------------------------------------------------------------------------------------------------

    def _with(self, other: Any, f: Callable[[Tensor, Any], Tensor]) -> PVector:
        if isinstance(other, Mapping):
            other = PVector.from_dict(self.layer_collection, other)
        if isinstance(other, PVector):
            self.layer_collection.require(other.layer_collection, "the other vector")
            return PVector(self.layer_collection, combined(f, self.tensor, other.tensor, 1))
        if isinstance(other, numbers.Real) or (isinstance(other, Tensor) and other.ndim == 0):
            return PVector(self.layer_collection, f(self.tensor, other))
        if isinstance(other, Tensor):  # one number a vector of the batch
            return PVector(self.layer_collection, combined(f, self.tensor, other.unsqueeze(-1), 1))
        given = type(other).__name__
        raise ArgumentTypeError(f"cannot combine a PVector with {given}; expected one, a number or numbers (*batch)")

    def _same(self, other: Any, f: Callable[[Tensor, Any], Tensor]) -> PVector:
        if isinstance(other, (int, float)) and other == 0:  # so that sum() works
            return self
        if not isinstance(other, (PVector, Mapping)):
            raise ArgumentTypeError(f"cannot add {type(other).__name__} to a PVector; expected a PVector")
        return self._with(other, f)

    def __add__(self, other: PVector | Literal[0]) -> PVector:
        return self._same(other, torch.add)

    def __radd__(self, other: Any) -> PVector:
        return self.__add__(other)

    def __sub__(self, other: PVector) -> PVector:
        return self._same(other, torch.sub)

    def __mul__(self, other: PVector | Tensor | float) -> PVector:
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: PVector | Tensor | float) -> PVector:
        return self._with(other, torch.div)

    def __neg__(self) -> PVector:
        return PVector(self.layer_collection, -self.tensor)

    def dot(self, other: PVector) -> Tensor:
        """Inner product with ``other``, ``(*batch)``."""
        if not isinstance(other, (PVector, Mapping)):
            raise ArgumentTypeError(f"the other vector is {type(other).__name__}; expected a PVector")
        return self._with(other, torch.mul).tensor.sum(-1)

    def norm(self, p: float = 2) -> Tensor:
        """The ``p``-norm of the whole vector, ``(*batch)``."""
        return vector_norm(self.tensor, p)

    def clone(self) -> PVector:
        """A copy."""
        return PVector(self.layer_collection, self.tensor.clone())

    def detach(self) -> PVector:
        """Without its graph."""
        return PVector(self.layer_collection, self.tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> PVector:
        """Another dtype or device, as ``Tensor.to``."""
        return PVector(self.layer_collection, self.tensor.to(*args, **kwargs))

    # -- writing to a model --------------------------------------------------------------------------------------------

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of ``model`` by this vector."""
        self._write(model, lambda p, v: p.copy_(v))

    def add_to(self, model: nn.Module, alpha: float = 1) -> None:
        """Add ``alpha`` times this vector to the parameters of ``model``."""
        self._write(model, lambda p, v: p.add_(v.to(p), alpha=alpha))

    def _write(self, model: nn.Module, f: Callable[[Tensor, Tensor], Any]) -> None:
        if self.batch_shape:
            batch = tuple(self.batch_shape)
            raise ArgumentError(f"cannot write a batch of vectors {batch} to a model; index one of them first")
        with torch.no_grad():
            for name, p in self.layer_collection.parameters(unwrap(model)).items():
                f(p, self[name])

"""A model on data, and how both are gone through: what every measure is given, held together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nngeom.capture.network import Batch, Network, as_batches, leading_size, targets
from nngeom.core import memory
from nngeom.core.errors import UnsupportedError
from nngeom.space.collection import LayerCollection

Function = Callable[..., Tensor] | None


@dataclass(frozen=True)
class Run:
    """A model on data: what every measure takes, by the same names.

    Objects that outlive the call which made them (implicit matrices, kernels and maps) keep their run, with its budget
    and its checks. :meth:`of` makes one from the arguments of a measure.

    Its ``network`` is the model with what names its parameters and runs it, ``loader`` the data, ``memory_budget`` in
    bytes; ``check`` and ``progress`` as for :meth:`of`. ``left_to_fallback``: parameters whose rows come from the
    per-example fallback, as sweeps find out.
    """

    network: Network
    loader: Any
    memory_budget: int
    check: bool = True
    progress: bool = False
    left_to_fallback: set[str] = field(default_factory=set, repr=False)

    @staticmethod
    def of(
        model: nn.Module,
        loader: Any,
        *,
        function: Function = None,
        layer_collection: LayerCollection | None = None,
        progress: bool = False,
        memory_budget: int | None = None,
        check: bool = True,
        process_group: Any = None,
    ) -> Run:
        """The run of the arguments that all measures take.

        Args:
            model: a module. Where it mixes examples or draws at random (batch normalisation or dropout in training
                mode) a measure raises :class:`ModeError`.
            loader: a ``DataLoader``, an iterable of batches, or a list of them; a tuple, tensor or dict is one batch.
            function: from a batch to its outputs ``(n, c)``: a tuple is unpacked, targets included, others are passed
                whole. By default ``model(inputs)``, for a dict ``model(**batch)`` without its labels.
            layer_collection: the parameters, all trainable ones by default.
            progress: whether a bar is shown.
            memory_budget: bytes of temporaries (1 GiB by default): work is cut to fit, the result stays the same.
            check: whether every batch is known to be complete, placed and right before it enters the result.
            process_group: not available yet; anything but ``None`` raises :class:`UnsupportedError`.

        Raises :class:`ArgumentTypeError`, :class:`DeviceError`, :class:`CollectionError` for what is no model or not
        its collection, :class:`ArgumentError` for a budget that is not positive, :class:`UnsupportedError` for a
        process group.
        """
        if process_group is not None:
            raise UnsupportedError(
                "process_group is not available yet; pass process_group=None and merge shards afterwards"
            )
        with memory.limit(memory_budget) as budget:
            return Run(Network.build(model, function, layer_collection), loader, budget, check, progress)

    def within(self) -> AbstractContextManager[int]:
        """Work under this run's memory budget."""
        return memory.limit(self.memory_budget)

    def batches(self) -> Iterator[Batch]:
        """The batches on the model's device; raises :class:`LoaderError` when there is none."""
        return self.network.batches(self.loader)

    def followed(self, label: str) -> Iterable[Batch]:
        """The batches, beside a bar named ``label`` where progress is to be shown."""
        source = as_batches(self.loader)
        if not self.progress:
            return self.network.batches(source)
        return tqdm(self.network.batches(source), total=_length(source), desc=label)

    def on(self, loader: Any) -> Run:
        """The same on another ``loader``."""
        return replace(self, loader=loader)

    def held(self) -> Run:
        """The same with its batches read now, once, and kept, so that every visit sees the same."""
        return self.on(list(self.batches()))

    def silent(self) -> Run:
        """The same without a progress bar."""
        return replace(self, progress=False)

    # -- of a run that is held -----------------------------------------------------------------------------------------

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Examples in every batch; a model is run on batches that do not tell."""
        return [self._size(batch) for batch in self.loader]

    @torch.no_grad()
    def _size(self, batch: Batch) -> int:
        n = leading_size(batch)
        return self.network.run(batch).shape[0] if n is None else n  # elsewhere running makes sure of as many outputs

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """The outputs ``(n, *shape)`` of all examples."""
        return torch.cat([self.network.run(batch) for batch in self.loader])

    def targets(self) -> Tensor | None:
        """The targets of all batches, concatenated; ``None`` where batches have none."""
        parts = [targets(batch) for batch in self.loader]
        if not all(isinstance(y, Tensor) for y in parts):
            return None
        return torch.cat([y.detach() for y in parts])


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # a generator, or an iterable data set
        return None

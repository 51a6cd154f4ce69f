"""What a model returns for a batch, checked: one row of real numbers an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nngeom.capture.batch import Batch, leading_size
from nngeom.core.errors import LoaderError, OutputError


def checked(outputs: Any, batch: Batch, source: str) -> Tensor:
    """The outputs ``(n, ...)`` that ``source``, a model or a function, returned for a batch; raises
    :class:`OutputError` for anything else, :class:`LoaderError` where there is no example.
    """
    if not isinstance(outputs, Tensor):
        raise OutputError(
            f"the {source} returned {type(outputs).__name__}; "
            "expected a tensor of "
            "outputs (n, c): pass function=lambda inputs, targets: ... to choose it"
        )
    if outputs.is_nested or outputs.layout is not torch.strided:
        kind = "nested" if outputs.is_nested else "sparse"
        raise OutputError(
            f"the outputs are a {kind} tensor; expected an ordinary one (n, ...): pad, pool or densify them "
            "in the model "
            "or in function="
        )
    if outputs.ndim == 0:
        raise OutputError(
            "the outputs are a single number; expected one row an example, (n, ...): do not average over the batch"
        )
    if outputs.ndim == 1:
        outputs = outputs.unsqueeze(1)
    if not outputs.is_floating_point():
        raise OutputError(f"the outputs have dtype {outputs.dtype}; expected real floating-point numbers")
    if outputs.shape[0] == 0:
        raise LoaderError("a batch has no examples; expected at least one")
    if outputs.numel() == 0:
        raise OutputError(f"the outputs have shape {tuple(outputs.shape)}, no number an example; expected at least one")
    size = leading_size(batch)
    if size is not None and outputs.shape[0] != size:
        raise OutputError(
            f"the outputs have shape {tuple(outputs.shape)} but the batch holds {size} examples; expected "
            f"({size}, ...): examples must stay along the first axis (positions of one example go behind it). Where "
            "they lie in tables of other lengths, as nodes of graphs do, a batch holds their numbers, and function= "
            "collates them"
        )
    return outputs


def called(model: nn.Module, batch: Batch) -> Any:
    """What ``model`` returns for the inputs of a batch; of an object with logits these."""
    if isinstance(batch, Mapping):
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
    elif isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 2:
            raise LoaderError(
                f"a batch is a {type(batch).__name__} of {len(batch)} items; expected (inputs, targets) or "
                "(inputs,): "
                "pass function=lambda *items: model(...) to say which are inputs"
            )
        x = batch[0]
        several = isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence)
        out = model(**x) if isinstance(x, Mapping) else model(*x) if several else model(x)
    else:
        out = model(batch)
    logits = None if isinstance(out, Tensor) else getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else out

"""What to do about a model or inputs that cannot be measured, where torch's own error does not say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.batch import Batch, tensors
from nngeom.capture.fused import CHECKPOINTED
from nngeom.core.errors import ArgumentError, ArgumentTypeError, LoaderError, NNGeomError, UnsupportedError
from nngeom.core.whole import in_parts

_FLAT = "FullyShardedDataParallel"
_WHOLE = r"\b(long|u?int|short|char|byte|bool)"  # dtypes of whole numbers, where real ones are wanted


def require_whole(modules: Iterable[tuple[str, nn.Module]], parameters: Mapping[str, Tensor], *, parts: bool) -> None:
    """Raise :class:`UnsupportedError` where a process holds parts of the ``parameters`` of named ``modules``;
    ``parts``: distributed tensors are welcome.
    """
    names = [name for name, p in parameters.items() if hasattr(p, "ds_numel") and p.ds_numel != p.numel()]
    if not parts:
        names += [name for name, p in parameters.items() if in_parts(p)]
    names += [name.rstrip(".") or "the model" for name, m in modules if type(m).__name__ == _FLAT]
    if names:
        raise UnsupportedError(
            f"parameters are spread over processes ({', '.join(names[:4])}: fully_shard, tensor parallelism, "
            f"{_FLAT} or ZeRO-3). Measures that take process_group= (FIM, GGN, GramMatrix, ...) are offered for "
            "fully_shard and tensor parallelism, unless differentiable=True; for anything else use a copy of the model "
            "that is not sharded, loaded from the gathered state (get_model_state_dict with full_state_dict=True)"
        )


def of_a_call(error: Exception, batch: Batch, parameters: Mapping[str, Tensor], function: Any) -> NNGeomError | None:
    """What to raise instead of ``error`` of the model or ``function``; ``None`` where the batch is not its cause."""
    if isinstance(error, NNGeomError):
        return None
    text, held = str(error), [x.dtype for x in tensors(batch)]
    if isinstance(error, TypeError):
        if function is not None or (held and isinstance(batch, (Tensor, Mapping, tuple, list))):
            return None
        kind = type(batch).__name__ if held else f"{type(batch).__name__} without tensors"
        return LoaderError(
            f"the model was called with the batch as it is, a {kind}, and does not take it ({text}); expected tensors "
            "in a tuple, list or dict: convert them, or pass function=lambda batch: model(...)"
        )
    if "nference tensor" in text:
        return ArgumentError(
            "a parameter or buffer of the model, or a tensor that function= uses, was made under torch.inference_mode "
            "and has no derivatives; expected ordinary tensors: make them outside, or pass copy.deepcopy(model) made "
            "outside"
        )
    wanted = {p.dtype for p in parameters.values()}
    mixed = len(wanted) > 1  # then one of its layers may not take what another gives
    given = {d for d in held if (d.is_floating_point or d.is_complex) and (mixed or d not in wanted)}
    if not given and held and not held[0].is_floating_point and re.search(_WHOLE, text, re.IGNORECASE):
        given = set(held[:1])
    if given and re.search(r"dtype|scalar type|input type", text, re.IGNORECASE):
        names = lambda dtypes: ", ".join(sorted(map(str, dtypes)))
        return ArgumentTypeError(
            f"the model does not take these inputs: the batch holds {names(given)}, the parameters are {names(wanted)} "
            f"({text.splitlines()[0]}); nothing is cast, as in torch: convert the inputs, x.to(dtype), or the model, "
            "model.double()"
        )
    return None


def gradients(outputs: Any, inputs: Any, v: Any, **options: Any) -> tuple[Tensor | None, ...]:
    """:func:`torch.autograd.grad`, ``None`` where unused.

    Raises :class:`UnsupportedError` for what torch differentiates by ``backward`` alone, or not at all.
    """
    try:
        return torch.autograd.grad(outputs, inputs, v, allow_unused=True, **options)
    except RuntimeError as error:
        text = str(error)
        if "use_reentrant" in text:
            raise UnsupportedError(
                "the model checkpoints with use_reentrant=True, which torch differentiates by .backward() only; "
                "expected use_reentrant=False, or no checkpointing, as in model.eval(); in transformers: "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            ) from error
        if "backward through the graph a second time" in text:
            raise UnsupportedError(
                "a part of the model's graph is kept from one call to the next (a weight computed once and cached: "
                "torch.nn.utils.parametrize.cached(), functools.lru_cache, a tensor held outside) and was used up by "
                "an earlier pass; expected everything that has a gradient to be computed in every call: measure "
                "outside of the cache"
            ) from error
        if type(error).__name__ == "CheckpointError":
            raise UnsupportedError(CHECKPOINTED) from error
        if "NestedTensor" in text or (options.get("create_graph") and "returns multiple views" in text):
            raise UnsupportedError(
                f"torch does not differentiate an operation of the model on nested tensors ({text.splitlines()[0]}); "
                "pad the sequences, or use layout=torch.jagged and measures without second derivatives"
            ) from error
        raise

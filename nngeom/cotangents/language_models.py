"""Which models are causal language models of ``transformers``, whose own loss compares logits with the *next* token's
label."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nngeom.space.collection import unwrap

_NAMES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_causal_lm(model: nn.Module | None) -> bool:
    """Whether a name for a loss may mean the shifted one for this model: a decoder of ``transformers`` (or ``peft``
    around one) that predicts tokens, or a module that holds one."""
    if model is None:
        return False
    hugging = _of_transformers(model)
    return any(map(_predicts_tokens, model.modules() if hugging is None else [hugging]))


def _predicts_tokens(module: nn.Module) -> bool:
    if not type(module).__name__.endswith(_NAMES) or _of_transformers(module) is None:
        return False
    return not getattr(getattr(module, "config", None), "is_encoder_decoder", False)


def shifts_labels(model: nn.Module | None) -> bool:
    """Whether its own loss shifts, as its code says.

    Decoders cut from encoder-decoder models (``BartForCausalLM``), permutation models (``XLNetLMHeadModel``) and some
    others compute a loss of ``logits[t]`` and ``labels[t]``; models for ``ConditionalGeneration`` differ. A class
    without a loss of its own goes by its name.
    """
    hugging = _of_transformers(model)
    if hugging is None or type(hugging).__name__.endswith("ForConditionalGeneration"):
        return False
    code = getattr(inspect.unwrap(type(hugging).forward), "__code__", None)
    names = () if code is None else (*code.co_names, *code.co_varnames)
    return "labels" not in names or any(name == "loss_function" or "shift" in name for name in names)


def _of_transformers(model: Any) -> nn.Module | None:
    """The model of ``transformers`` that this is, or that ``peft`` has around it."""
    if not isinstance(model, nn.Module):
        return None
    model = unwrap(model)
    bases = [(base.__module__.split(".")[0], base.__name__) for base in type(model).__mro__]
    if ("peft", "PeftModel") in bases:
        return _of_transformers(model.get_base_model())
    return model if ("transformers", "PreTrainedModel") in bases else None

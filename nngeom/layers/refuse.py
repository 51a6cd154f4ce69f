"""Calls that couple examples or are random: refused, because per-example derivatives of them do not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from nngeom.core.errors import ModeError

_DROPOUT = "dropout is active, so the measure would be random; call model.eval() (or set its probability to 0)"
_BATCH_NORM = (
    "batch normalisation uses the statistics of the batch, so examples are mixed; call model.eval() (and "
    "keep track_running_stats=True)"
)

REFUSALS: dict[Any, Callable[..., None]] = {}


def _refuses(*functions: Any):
    def register(check):
        for function in functions:
            REFUSALS[function] = check
        return check

    return register


@_refuses(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(input, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    if training and p > 0:
        raise ModeError(_DROPOUT)


@_refuses(F.alpha_dropout, F.feature_alpha_dropout)
def _alpha_dropout(input, p: float = 0.5, training: bool = False, inplace: bool = False) -> None:
    if training and p > 0:
        raise ModeError(_DROPOUT)


@_refuses(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout)
def _native_dropout(input, p: float, train: bool) -> None:
    if train and p > 0:
        raise ModeError(_DROPOUT)


@_refuses(F.scaled_dot_product_attention)
def _attention(query, key, value, attn_mask=None, dropout_p: float = 0.0, *args, **kwargs) -> None:
    if dropout_p > 0:
        raise ModeError(_DROPOUT)


@_refuses(F.multi_head_attention_forward)
def _multi_head(*args, **kwargs) -> None:
    dropout = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
    training = kwargs.get("training", args[13] if len(args) > 13 else True)
    if training and dropout > 0:
        raise ModeError(_DROPOUT)


@_refuses(F.batch_norm)
def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training: bool = False, *args, **kwargs
) -> None:
    if training:
        raise ModeError(_BATCH_NORM)


@_refuses(F.rrelu)
def _rrelu(input, lower=1 / 8, upper=1 / 3, training: bool = False, inplace: bool = False) -> None:
    if training:
        raise ModeError("rrelu draws random slopes in training mode; call model.eval()")


@_refuses(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _recurrent(input, hx, params, has_biases, num_layers, dropout=0.0, train=False, *args) -> None:
    if isinstance(train, bool) and train and isinstance(dropout, float) and dropout > 0:
        raise ModeError(_DROPOUT)


@_refuses(F.embedding, torch.embedding)
def _embedding(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    if scale_grad_by_freq:
        raise ModeError(
            "scale_grad_by_freq divides gradients by counts over the batch, so examples are mixed; set it to False"
        )

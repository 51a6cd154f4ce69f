"""Recurrent layers and cells by their formulas, one step after the other: linear maps of inputs and of states.

What torch runs as one operation uses each matrix once a step; written out, every use is seen, and weights have the
structure of a linear map at as many positions as there are steps. Letters: ``n`` examples, ``t`` steps, ``h`` states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]  # h, and c of an LSTM
Step = Callable[[Tensor, Tensor, State], State]  # of the maps of an input and of a state, and the state before


def _lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    new, z = (xn + (xr + hr).sigmoid() * hn).tanh(), (xz + hz).sigmoid()
    return (new + z * (state[0] - new),)


def _tanh_step(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu_step(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _direction(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], *, biases: bool, here: Tensor | None = None
) -> tuple[Tensor, State]:
    """The states after every step ``[t n h]`` and after the last, of one direction of one layer; ``here [t n]``: which
    sequences have the step, the states of others stay.
    """
    w_x, w_h = weights[:2]
    b_x, b_h = weights[2:4] if biases else (None, None)
    projection = weights[-1] if len(weights) == 2 * biases + 3 else None
    outputs = []
    for t, mapped in enumerate(F.linear(x, w_x, b_x).unbind(0)):
        new = step(mapped, F.linear(state[0], w_h, b_h), state)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        state = new if here is None else tuple(torch.where(here[t, :, None], s, old) for s, old in zip(new, state))
        outputs.append(state[0])
    return torch.stack(outputs), state


def _layers(
    step: Step,
    x: Tensor,
    states: State,
    weights: Sequence[Tensor],
    options: Sequence[Any],
    here: Tensor | None = None,
) -> Any:
    """``(output, *states)`` of all layers and directions, with the options as torch's own functions have them; ``here``
    as for one direction.
    """
    biases, layers, _, _, both, batch_first = options
    x, ends, directions = x.transpose(0, 1) if batch_first else x, [], 1 + both
    each = len(weights) // (layers * directions)
    for layer in range(layers):
        outputs = []
        for backwards in range(directions):
            at = layer * directions + backwards
            mine = weights[at * each : (at + 1) * each]
            read, there = (x.flip(0), here if here is None else here.flip(0)) if backwards else (x, here)
            out, end = _direction(step, read, tuple(s[at] for s in states), mine, biases=biases, here=there)
            outputs.append(out.flip(0) if backwards else out)
            ends.append(end)
        x = torch.cat(outputs, -1) if both else outputs[0]
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(s) for s in zip(*ends)))


def _sequences(step: Step) -> Callable[..., Any]:
    def run(x: Tensor, states: State | Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
        return _layers(step, x, (states,) if isinstance(states, Tensor) else states, weights, options)

    return run


def _packed(step: Step) -> Callable[..., Any]:
    """Of packed sequences, the longest first: padded, where steps beyond the end of a sequence change nothing.

    ``order``: their places in the batch, in which they are put back for the time of the layer.
    """

    def run(
        data: Tensor,
        sizes: Tensor,
        states: State | Tensor,
        weights: Sequence[Tensor],
        *options: Any,
        order: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        n = int(sizes[0])
        here = (torch.arange(n) < sizes[:, None]).to(data.device)
        rows = here.unsqueeze(-1).expand(*here.shape, data.shape[-1])
        x = data.new_zeros(rows.shape).masked_scatter(rows, data)
        initial = (states,) if isinstance(states, Tensor) else states
        if order is None:
            out, *ends = _layers(step, x, initial, weights, [*options, False], here)
            return (out[here], *ends)
        back = order.argsort()
        moved, *first = (t.index_select(1, back) for t in (x, *initial))
        out, *ends = _layers(step, moved, tuple(first), weights, [*options, False], here.index_select(1, back))
        out, *ends = (t.index_select(1, order) for t in (out, *ends))
        return (out[here], *ends)

    return run


def _cell(step: Step) -> Callable[..., Any]:
    def run(
        x: Tensor,
        states: State | Tensor,
        w_x: Tensor,
        w_h: Tensor,
        b_x: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        state = (states,) if isinstance(states, Tensor) else states
        new = step(F.linear(x, w_x, b_x), F.linear(state[0], w_h, b_h), state)
        return new if len(new) > 1 else new[0]

    return run


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step}
_SEQUENCES: dict[Any, Callable[..., Any]] = {getattr(torch, name): _sequences(step) for name, step in _STEPS.items()}
_PACKED: dict[Any, Callable[..., Any]] = {getattr(torch, name): _packed(step) for name, step in _STEPS.items()}
_CELLS: dict[Any, Callable[..., Any]] = {getattr(torch, f"{name}_cell"): _cell(step) for name, step in _STEPS.items()}


def unrolled(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], order: Tensor | None = None
) -> Callable[..., Any] | None:
    """What computes the same as ``func`` of these arguments, one step after the other; ``None`` for what is no
    recurrent layer, and for sequences without steps, dropout between layers, and what autocast makes of one as a whole,
    in a precision of its kernel's own, which are not written out. ``order``: of packed sequences that were sorted.
    """
    if (func in _CELLS or func in _SEQUENCES) and torch.is_autocast_enabled(args[0].device.type):
        return None
    if func in _CELLS:
        return _CELLS[func]
    if func in _PACKED and not kwargs and len(args) == 9 and isinstance(args[4], bool):
        return None if args[6] and args[7] and args[5] > 1 else functools.partial(_PACKED[func], order=order)
    if func not in _SEQUENCES or kwargs or len(args) != 9 or not isinstance(args[3], bool):
        return None
    layers, dropout, train, batch_first = args[4], args[5], args[6], args[8]
    if (dropout and train and layers > 1) or args[0].ndim != 3 or not args[0].shape[1 if batch_first else 0]:
        return None
    return _SEQUENCES[func]

"""Linear maps written as ``torch.einsum`` of an input and a parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts


@adapts(torch.einsum)
def einsum(call: Call, equation: str, *operands) -> Use:
    """Two operands, one of them a whole parameter; every letter of it is a group, an output or an input.

    A letter of the parameter is a group when the input and the output have it too, an output when the input lacks it,
    an input when the output lacks it.
    """
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise NotStructured
    left, arrow, result = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if call.is_parameter(operands[0]) == call.is_parameter(operands[1]):
        raise NotStructured
    w_side = 0 if call.is_parameter(operands[0]) else 1
    w, x, letters, own = operands[w_side], operands[1 - w_side], sides[w_side], sides[1 - w_side]
    if not arrow:
        result = "".join(sorted(c for c in set(letters + own) - {"."} if (letters + own).count(c) == 1))
        result = ("..." if "..." in own else "") + result
    own, result, x_shape, out_shape = _name_dots(own, result, x, call.out)
    if "." in letters or any(len(set(s)) < len(s) for s in (letters, own, result)):
        raise NotStructured
    groups = [c for c in letters if c in own and c in result]
    outs = [c for c in letters if c not in own and c in result]
    ins = [c for c in letters if c in own and c not in result]
    if len(groups) + len(outs) + len(ins) < len(letters) or set(own) - set(result) - set(ins):
        raise NotStructured  # a letter summed on one side only
    lead = [c for c in own if c in result and c not in groups]
    size = dict(zip(letters, w.shape)) | dict(zip(own, x_shape))
    if any(size[c] != n for names, shape in ((letters, w.shape), (result, out_shape)) for c, n in zip(names, shape)):
        raise NotStructured  # a letter of size one in one operand, broadcast to that of the other
    total = lambda part: math.prod(size[c] for c in part)
    order = tuple(letters.index(c) for c in (*groups, *outs, *ins))
    arrangement = Arrangement(tuple(w.shape), order, (total(groups), total(outs), total(ins)))
    slot, kept = call.whole(w, arrangement), call.keep(x)

    def read(t: Tensor, names: str, first: int, last: list[str], width: int) -> Tensor:
        t = t.permute(*range(first), *(first + names.index(c) for c in (*lead, *groups, *last)))
        return t.reshape(*t.shape[: first + len(lead)], total(groups), width)

    return Use(
        "einsum",
        slot,
        None,
        tuple(size[c] for c in lead),
        gradients=lambda g: read(g.reshape(g.shape[0], *out_shape), result, 1, outs, total(outs)),
        inputs=lambda: read(kept.reshape(x_shape), own, 0, ins, total(ins)),
    )


def _name_dots(own: str, result: str, x: Tensor, out: Tensor) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
    """An ellipsis of the input and the output becomes capital letters beyond the alphabet in use."""
    if "..." not in own:
        if "..." in result:
            raise NotStructured
        return own, result, tuple(x.shape), tuple(out.shape)
    names = "".join(chr(0x100 + j) for j in range(x.ndim - len(own.replace("...", ""))))
    return own.replace("...", names), result.replace("...", names), tuple(x.shape), tuple(out.shape)

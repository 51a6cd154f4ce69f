"""A layer: two branches, interpolated with a learned weight a feature, and the adapter of its operation."""

import torch
from torch import Tensor, nn

from nngeom.layers import Arrangement, Call, NotStructured, Use, adapts


class Mix(nn.Module):
    """``(1 - w) x + w inner(x)``, features last."""

    def __init__(self, features: int, inner: nn.Module):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.full((features,), 0.5)), inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.inner(x), self.weight)


@adapts(torch.lerp, Tensor.lerp)
def lerp(call: Call, input: Tensor, end: Tensor, weight: Tensor) -> Use:
    """``input + weight (end - input)``; called with the arguments of the operation, ``weight [s]`` a parameter."""
    out = call.out.shape
    if not isinstance(weight, Tensor) or weight.shape != out[-1:]:
        raise NotStructured  # other shapes go through the fallback
    x, y = call.keep(input), call.keep(end)  # detached, to be read later
    return Use(
        "lerp",
        weight=call.whole(weight, Arrangement.plain(out[-1], 1, 1)),  # the weight as a matrix [s, o, i]
        bias=None,
        lead=tuple(out[:-1]),  # axes that hold examples and positions
        gradients=lambda g: g.unsqueeze(-1),  # [k, *out] -> [k, *lead, s, o]
        inputs=lambda: (y - x).expand(out).unsqueeze(-1),  # -> [*lead, s, i]
        elementwise=True,  # o = 1: exact small blocks
    )

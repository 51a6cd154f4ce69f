"""Watching one forward pass from outside: the states of ReLU-like units and the input of a layer, without hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nngeom.core.errors import ArgumentError, StructureError

# Activations that change slope where their input changes sign.
RECTIFIERS = {
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    torch.prelu,
    Tensor.prelu,
    F.rrelu,
    F.rrelu_,
    torch.rrelu,
    F.elu,
    F.elu_,
    F.celu,
    F.selu,
    F.selu_,
    torch.celu,
    torch.selu,
    F.relu6,
}
CLAMPS = {
    torch.clamp,
    torch.clamp_,
    Tensor.clamp,
    Tensor.clamp_,
    torch.clamp_min,
    torch.clamp_min_,
    Tensor.clamp_min,
    Tensor.clamp_min_,
}
# Maps with parameters whose input counts as a representation.
LINEAR_MAPS = {
    F.linear,
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.addmm,
    torch.einsum,
}


class Watch(TorchFunctionMode):
    """Records ``signs``, one boolean tensor an activation, and the input of the last linear map, or of ``layer``'s
    first call.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.parameters = {id(p) for p in model.parameters()}
        self.wanted = self.parameters if layer is None else _parameters_of(model, layer)
        self.signs: list[Tensor] = []
        self.input: Tensor | None = None
        self.examples, self.others = 0, set[int]()  # axes that hold something else

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_rectifier(func, args, kwargs):
            x = args[0] if args else kwargs["input"]
            self.signs.append(x.detach() > 0)
        if (func in LINEAR_MAPS) if self.layer is None else (self.input is None):
            tensors = _tensors((args, kwargs))
            if any(self._among(t, self.wanted) for t in tensors):
                inputs = [t for t in tensors if not self._among(t, self.parameters) and t.ndim]
                if inputs:
                    self.input = inputs[0].detach().clone()  # a later in-place activation may overwrite it
        return func(*args, **kwargs)

    def _among(self, t: Tensor, ids: set[int]) -> bool:
        return id(t) in ids or (t._base is not None and id(t._base) in ids)

    def representation(self) -> Tensor:
        """The recorded input with the examples first, ``(n, p)``; raises :class:`StructureError` where there is
        none.
        """
        if self.input is None:
            what = (
                "no linear map with parameters was called"
                if self.layer is None
                else f"no call used the parameters of layer {self.layer!r}"
            )
            raise StructureError(f"{what}; pass layer= with the name of a module that is used")
        x, axes = self.input, self.axes
        if len(axes) != 1:
            found = "no axis" if not axes else "several axes"
            raise StructureError(
                f"the layer's input has shape {tuple(x.shape)}, {found} of {self.examples} examples; pass layer= with "
                "the name of another, or batches of another size"
            )
        return x.movedim(axes[0], 0).flatten(1)

    @property
    def axes(self) -> list[int]:
        """The axes of the recorded input that are as long as the batch, and may hold the examples."""
        shape = () if self.input is None else self.input.shape
        return [axis for axis, size in enumerate(shape) if size == self.examples and axis not in self.others]

    def compare(self, more: Watch) -> None:
        """Of several such axes, leave those that were longer in a pass of more examples."""
        if self.input is not None and more.input is not None and self.input.ndim == more.input.ndim:
            self.others = {axis for axis in self.axes if more.input.shape[axis] != more.examples}


def _parameters_of(model: nn.Module, layer: str) -> set[int]:
    names = dict(model.named_modules())
    found = {id(p) for p in names[layer].parameters()} if layer in names else set()
    if not found:
        owners = [name for name, m in names.items() if name and any(True for _ in m.parameters())]
        raise ArgumentError(f"layer is {layer!r}; expected the name of a module with parameters, one of {owners[:12]}")
    return found


def _is_rectifier(func: Any, args: tuple, kwargs: dict) -> bool:
    if func in RECTIFIERS:
        return True
    if func not in CLAMPS:
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    return isinstance(low, (int, float)) and low == 0


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [t for item in x for t in _tensors(item)] if isinstance(x, (tuple, list)) else []

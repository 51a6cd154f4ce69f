"""What stands in the modules of a model under ``fully_shard`` in the place of a parameter that is in parts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nngeom.capture.gathered import groups_of, sharded_modules
from nngeom.core.whole import gathered_from, in_parts
from nngeom.space.collection import unwrap


@dataclass(frozen=True, eq=False)
class StandIn:
    """A ``parameter`` of the shape of one that is ``kept`` in parts, at all ``places``, modules and names, of that.

    Without numbers of its own each entry is NaN, so that who reads it unasked is found out.
    """

    parameter: nn.Parameter
    kept: Any
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the whole parameter, as casts of a mixed precision policy have it."""
        return self.parameter.dtype

    @property
    def nbytes(self) -> int:
        """Of the whole parameter."""
        return self.parameter.numel() * self.dtype.itemsize

    def gathered(self) -> Tensor:
        """The whole parameter, on all processes of its mesh, which call this together."""
        return gathered_from(self.kept, self.dtype, self.parameter.device)

    def clear(self) -> None:
        """As before its numbers were there."""
        self.parameter.data = _blank(self.parameter.shape, self.dtype, self.parameter.device)

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Within: it stands at its places."""
        held = [module._parameters[name] for module, name in self.places]
        try:
            for module, name in self.places:
                _put(module, name, self.parameter)
            yield
        finally:
            for (module, name), p in zip(self.places, held):
                _put(module, name, p)
            self.clear()


_KNOWN: WeakKeyDictionary[Any, nn.Parameter] = WeakKeyDictionary()  # the same whenever the same parameter is measured


def stand_ins(model: nn.Module) -> list[StandIn]:
    """One for every parameter that a process holds a part of; the same tensors each time."""
    return [_stand_in(param) for param in _params(model)]


def can_stand_in(model: nn.Module) -> bool:
    """Whether there are such, of real numbers, in parts over one axis alone that ``fully_shard`` gave them."""
    listed = _params(model)
    simple = (not p.is_dtensor and not hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in listed)
    return bool(listed) and all(simple) and all(p.sharded_param.is_floating_point() for p in listed)


def bytes_of(model: nn.Module) -> int:
    """What all of them take when they are whole."""
    return sum(math.prod(p.sharded_param.shape) * _dtype(p).itemsize for p in _params(model))


def _params(model: nn.Module) -> list[Any]:
    """What ``fully_shard`` knows of each parameter."""
    modules: list[Any] = sharded_modules(unwrap(model))
    return [param for module in modules for group in groups_of(module) for param in group.fsdp_params]


def _stand_in(param: Any) -> StandIn:
    info, kept, dtype = param._module_info, param.sharded_param, _dtype(param)
    places = ((info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names))
    now = info.module._parameters.get(info.param_name)
    kept = now if in_parts(now) else kept  # loaded by assignment, which ``fully_shard`` learns of when the model is run
    p = _KNOWN.get(param)
    if p is None or (p.shape, p.dtype, p.device) != (kept.shape, dtype, param.device):
        p = _KNOWN[param] = nn.Parameter(_blank(kept.shape, dtype, param.device))
    p.requires_grad_(kept.requires_grad)
    return StandIn(p, kept, places)


def _dtype(param: Any) -> torch.dtype:
    dtype: torch.dtype = param.mp_policy.param_dtype or param.sharded_param.dtype
    return dtype


def _blank(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device).expand(shape)


def _put(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
    """Of modules that keep their parameters in other places too, as recurrent ones do, by their own means."""
    if getattr(module.__setattr__, "__func__", None) is nn.Module.__setattr__:
        module._parameters[name] = p
    else:
        setattr(module, name, p)

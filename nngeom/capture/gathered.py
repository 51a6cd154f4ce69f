"""Models whose parameters ``fully_shard`` keeps in parts, made whole for the duration of a call.

Every module holds its whole parameters then and runs as it would without ``fully_shard``: its hooks, which exchange
parameters, gather and reduce in the middle of passes, do nothing meanwhile but the casts of a mixed precision policy.
So passes are those of one process, whatever they are differentiated by, and no process waits for another.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nngeom.capture.batch import each
from nngeom.core.errors import UnsupportedError
from nngeom.core.whole import in_parts
from nngeom.space.collection import unwrap
from nngeom.space.walk import modules

_HOOKS = "torch.distributed.fsdp._fully_shard"  # the module that hooks of ``fully_shard`` come from
_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that are gathered now, by a call that encloses this


def sharded_modules(model: Any) -> list[nn.Module]:
    """The modules that were given to ``fully_shard``, outer ones first."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [m for m in modules(model) if isinstance(m, kind)] if kind and isinstance(model, nn.Module) else []


def ranks_of(model: nn.Module) -> set[int]:
    """The processes that hold parts of the parameters of modules given to ``fully_shard``, this one's mesh."""
    groups = (group for module in sharded_modules(unwrap(model)) for group in groups_of(module))
    return {int(rank) for group in groups for rank in group.mesh_info.mesh.mesh.flatten().tolist()}


def groups_of(module: Any) -> list[Any]:
    """The groups of parameters that ``fully_shard`` made of a module."""
    state = module._get_fsdp_state()
    return [group for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] if group]


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within: the parameters of ``model`` are whole, on every process of its mesh, which all enter together.

    Afterwards they are in parts as before, also after an exception. What encloses another of the same model gathers.
    """
    possible = "torch.distributed.fsdp" in sys.modules  # else no module was given to it
    sharded = [m for m in sharded_modules(unwrap(model)) if m not in _WHOLE] if possible else []
    if not sharded:
        yield
        return
    with contextlib.ExitStack() as stack:
        for module in reversed(sharded):  # inner ones first: what changes in an outer one is its own
            stack.enter_context(_gathered(module))
        yield


@contextlib.contextmanager
def _gathered(module: Any) -> Iterator[None]:
    before = list(map(id, module.parameters()))
    with torch.inference_mode(mode=False):
        module.unshard()
    parted = before != list(map(id, module.parameters()))
    try:
        with as_whole(module):
            yield
    finally:
        if parted:
            module.reshard()


@contextlib.contextmanager
def as_whole(module: nn.Module) -> Iterator[None]:
    """Within: a module is run as if it had never been given to ``fully_shard``, on parameters that who enters this
    looks after.
    """
    with _without_hooks(module):
        _WHOLE.add(module)
        try:
            yield
        finally:
            _WHOLE.discard(module)


@contextlib.contextmanager
def _without_hooks(module: Any) -> Iterator[None]:
    """Within: hooks of ``fully_shard``, and methods with some (``register_fsdp_forward_method``), cast and do nothing
    else.
    """
    policy = module._get_fsdp_state()._mp_policy
    given = policy.param_dtype if policy.cast_forward_inputs else None
    casts = [
        (module._forward_pre_hooks, _cast_inputs(given)),
        (module._forward_hooks, _cast_outputs(policy.output_dtype)),
    ]
    changes = [(table, key, cast) for table, cast in casts for key, hook in table.items() if _is_theirs(hook)]
    for name, method in vars(module).items():
        if _is_theirs(method):
            changes.append((vars(module), name, _casting(method.__wrapped__, given, policy.output_dtype)))
    held = [(table, key, table[key]) for table, key, _ in changes]
    for table, key, other in changes:
        table[key] = other
    try:
        yield
    finally:
        for table, key, own in held:
            table[key] = own


def _is_theirs(function: Any) -> bool:
    """Whether a hook or a method was made by ``fully_shard``."""
    code = getattr(function, "__func__", function)
    return str(getattr(code, "__globals__", {}).get("__name__", "")).startswith(_HOOKS)


def _cast_inputs(dtype: torch.dtype | None) -> Callable[..., Any]:
    return lambda module, args, kwargs: None if dtype is None else (_cast(args, dtype), _cast(kwargs, dtype))


def _cast_outputs(dtype: torch.dtype | None) -> Callable[..., Any]:
    return lambda module, args, output: None if dtype is None else _cast(output, dtype)


def _casting(method: Callable[..., Any], given: torch.dtype | None, returned: torch.dtype | None) -> Callable[..., Any]:
    """A method whose inputs and outputs are cast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs) if given is None else method(*_cast(args, given), **_cast(kwargs, given))
        return out if returned is None else _cast(out, returned)

    return run


def _cast(x: Any, dtype: torch.dtype) -> Any:
    def other(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, (Tensor, PackedSequence)) and t.data.is_floating_point() else t

    return each(x, other)


def require_gathered(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise :class:`UnsupportedError` where modules hold parts in the place of these whole ``parameters``."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parted = [name for name, p in parameters.items() if named[name] is not p and in_parts(named[name])]
    if parted:
        raise UnsupportedError(
            f"the parameters {parted[:4]} of a model under fully_shard are in parts where it is run; expected whole "
            "ones, as a measure with process_group= gathers them: reshard nothing inside the model or function="
        )

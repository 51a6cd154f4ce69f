"""Models under ``fully_shard`` in training, whole for a while.

Their hooks run, and reduce gradients after a backward pass as ever, but have nothing to gather and part nothing: each
process may ask its graph as often as it likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nngeom.capture.gathered import groups_of, sharded_modules


@contextlib.contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Within: the parameters of ``model`` are whole, through forward and backward passes of the user's; all processes
    of its mesh enter together. Afterwards they are in parts.
    """
    modules: list[Any] = sharded_modules(model)
    for module in _outer(modules):
        module._get_fsdp_state()._lazy_init()  # else the first forward pass would, and set what is set here
    groups = [group for module in modules for group in groups_of(module)]
    held = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    for group in groups:
        group.post_forward_mesh_info, group.reshard_after_backward = None, False
    try:
        with torch.inference_mode(mode=False):
            for module in modules:
                module.unshard()
        yield
    finally:
        for group, after_forward, after_backward in held:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, after_backward
        for module in modules:
            module.reshard()


def _outer(modules: list[nn.Module]) -> list[Any]:
    """Those that are in no other."""
    inside = {id(m) for module in modules for m in module.modules() if m is not module}
    return [module for module in modules if id(module) not in inside]

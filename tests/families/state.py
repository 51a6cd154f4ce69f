"""What outlives a forward pass: what measuring must leave as it was."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Values, gradients, modes, hooks and random states, by name."""
    state: dict[str, Any] = {
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": str(np.random.get_state()),
        "python's random state": random.getstate(),
    }
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = p.detach().clone()
        state[f"{name}.grad"] = None if p.grad is None else p.grad.clone()
        state[f"{name}.requires_grad"] = p.requires_grad
    for name, m in model.named_modules():
        state[f"mode of {name}"] = m.training
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        state[f"hooks of {name}"] = [len(getattr(m, kind, ())) for kind in hooks]
    return state


def same(a: Any, b: Any) -> bool:
    """Equality, bit by bit for tensors."""
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b


@contextlib.contextmanager
def unchanged(model: nn.Module):
    """Buffers and random states are put back afterwards."""
    kept = {name: b.detach().clone() for name, b in model.named_buffers()}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    with torch.no_grad():
        for name, b in model.named_buffers():
            with torch.autograd._unsafe_preserve_version_counter(b):  # a graph may have saved it, and not read it
                b.copy_(kept[name])

"""kfac-jax: its estimate of the Kronecker factors of a dense net, compiled, on weights and data taken from torch.

A release for a newer JAX than that of neural-tangents (extra ``bench-jax``), so it is installed apart:
``pip install kfac-jax==0.0.8 jax==0.9.0``; with JAX 0.10 it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

if torch.get_num_threads() == 1:  # before the first use: one thread, as the others
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import kfac_jax
from jax import numpy as jnp

Run = Callable[[], Any]


def estimate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Run, Run]:
    """An update of the factors with one sampled label an example, which gives those of the inputs ``[(i+1)^2]``, and a
    gradient of the loss in the same framework.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = [(jnp.asarray(m.weight.detach().numpy().T), jnp.asarray(m.bias.detach().numpy())) for m in layers]
    data = jnp.asarray(x.flatten(1).numpy()), jnp.asarray(y.numpy())

    def outputs(weights: Any, inputs: Any) -> Any:
        for j, (w, b) in enumerate(weights):
            inputs = inputs @ w + b
            inputs = jax.nn.relu(inputs) if j + 1 < len(weights) else inputs
        return inputs

    def loss(weights: Any, batch: Any) -> Any:
        logits = outputs(weights, batch[0])
        kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1).mean()

    estimator = kfac_jax.BlockDiagonalCurvature(loss, default_estimation_mode="fisher_gradients")
    args, key = (weights, data), jax.random.PRNGKey(0)
    state = estimator.init(key, args, None, None)

    def update(state: Any, key: Any, args: Any) -> Any:
        made = estimator.update_curvature_matrix_estimate(state, 0.0, 1.0, 0.0, len(x), key, args)
        return [[f.value for f in block.factors] for block in made.blocks_states]

    compiled = jax.jit(update).lower(state, key, args).compile()
    gradient = jax.jit(jax.grad(loss)).lower(*args).compile()
    sizes = [m.in_features + 1 for m in layers]

    def run() -> list[Tensor]:
        blocks = jax.block_until_ready(compiled(state, key, args))
        return [_of_size(factors, size) for factors, size in zip(blocks, sizes)]

    return run, lambda: jax.block_until_ready(gradient(*args))


def _of_size(factors: Any, size: int) -> Tensor:
    found = next(f for f in factors if f.shape[0] == size)
    return torch.from_dlpack(found).flatten()

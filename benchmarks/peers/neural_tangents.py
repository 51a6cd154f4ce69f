"""neural-tangents in JAX: the same nets, rebuilt from the weights, with channels last and weights as (in, out).

Its last release runs with the versions of the extra ``bench-jax``. Compiled ahead for the shapes of the workload, so
that neither time nor memory holds the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import Encoder, Workload

if torch.get_num_threads() == 1:  # before the first use: one thread, as the others
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import neural_tangents as nt
from jax import numpy as jnp


def _dense(m: nn.Linear) -> dict[str, Any]:
    return {"w": jnp.asarray(m.weight.detach().cpu().numpy().T), "b": jnp.asarray(m.bias.detach().cpu().numpy())}


def _conv(m: nn.Conv2d) -> dict[str, Any]:
    return {
        "w": jnp.asarray(m.weight.detach().cpu().numpy().transpose(2, 3, 1, 0)),
        "b": jnp.asarray(m.bias.detach().cpu().numpy()),
    }


def _sequential(model: nn.Sequential) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Weights and ``(weights, x) -> outputs``; images are ``(n, h, w, channels)`` inside."""
    layers = list(model)
    weights = [_dense(m) if isinstance(m, nn.Linear) else _conv(m) if isinstance(m, nn.Conv2d) else {} for m in layers]

    def apply(weights, x):
        if x.ndim == 4:
            x = x.transpose(0, 2, 3, 1)
        for m, p in zip(layers, weights):
            if isinstance(m, nn.Linear):
                x = x @ p["w"] + p["b"]
            elif isinstance(m, nn.Conv2d):
                padding = [(q, q) for q in m.padding]
                x = (
                    jax.lax.conv_general_dilated(
                        x, p["w"], m.stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
                    )
                    + p["b"]
                )
            elif isinstance(m, nn.ReLU):
                x = jax.nn.relu(x)
            elif isinstance(m, nn.MaxPool2d):
                q = m.kernel_size
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, q, q, 1), (1, q, q, 1), "VALID")
            elif isinstance(m, nn.Flatten):
                x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
            else:
                raise TypeError(f"no counterpart of {type(m).__name__}")
        return x

    return weights, apply


def _norm(m: nn.LayerNorm) -> dict[str, Any]:
    return {"w": jnp.asarray(m.weight.detach().cpu().numpy()), "b": jnp.asarray(m.bias.detach().cpu().numpy())}


def _encoder(model: Encoder) -> tuple[Any, Callable[[Any, Any], Any]]:
    parts = ("norm1", "norm2", "qkv", "out", "up", "down")
    of = lambda m: _norm(m) if isinstance(m, nn.LayerNorm) else _dense(m)
    weights = {
        "embed": _dense(model.embed),
        "head": _dense(model.head),
        "blocks": [{name: of(getattr(b, name)) for name in parts} for b in model.blocks],
    }
    heads, eps = model.blocks[0].heads, model.blocks[0].norm1.eps
    dense = lambda p, x: x @ p["w"] + p["b"]

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["w"] + p["b"]

    def block(p, x):
        n, t, width = x.shape
        q, k, v = dense(p["qkv"], norm(p["norm1"], x)).reshape(n, t, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        attention = jax.nn.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -1)
        x = x + dense(p["out"], (attention @ v).transpose(0, 2, 1, 3).reshape(n, t, width))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x)), approximate=False))

    def apply(weights, x):
        x = dense(weights["embed"], x)
        for p in weights["blocks"]:
            x = block(p, x)
        return dense(weights["head"], x.mean(1))

    return weights, apply


def gram(implementation: str):
    """The tangent kernel of all outputs, examples mapped over (``vmap_axes=0``)."""

    def setup(w: Workload):
        weights, apply = (_encoder if isinstance(w.model, Encoder) else _sequential)(w.model)  # type: ignore[arg-type, operator]
        if w.inputs.device.type != jax.default_backend().replace("gpu", "cuda"):
            raise RuntimeError(f"JAX runs on {jax.default_backend()}, the workload is on {w.inputs.device.type}")
        x = jnp.asarray(w.batches[0][0].cpu().numpy())
        kind = getattr(nt.NtkImplementation, implementation)
        kernel = nt.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=kind)
        compiled = jax.jit(lambda x, weights: kernel(x, None, weights)).lower(x, weights).compile()
        run = lambda: compiled(x, weights).block_until_ready()
        return run, lambda k: torch.from_numpy(jax.device_get(k).copy()).permute(2, 0, 3, 1).flatten()

    return setup


CONTENDERS = {
    "neural-tangents": {"J6": gram("STRUCTURED_DERIVATIVES")},
    "neural-tangents (Jacobian contraction)": {"J6": gram("JACOBIAN_CONTRACTION")},
}

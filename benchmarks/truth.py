"""Slow, independent answers in float64 on a few examples: what every contender must agree with before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Workload


def jacobian(w: Workload, create_graph: bool = False) -> Tensor:
    """``(c, n, d)``, every output of every example by itself."""
    parameters = list(w.model.parameters())
    rows = []
    for x in w.inputs:
        outputs = w.model(x[None])[0]
        grads = [torch.autograd.grad(f, parameters, retain_graph=True, create_graph=create_graph) for f in outputs]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]))
    return torch.stack(rows, 1)


def metric(w: Workload) -> Tensor:
    """``diag(p) - p p^T``, ``(n, c, c)``."""
    p = w.model(w.inputs).detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def fisher_rows(w: Workload) -> Tensor:
    """``(c, n, d)`` with ``sum_kn r r^T / n`` the exact Fisher matrix: Jacobian times the root of the metric."""
    values, vectors = torch.linalg.eigh(metric(w))
    return torch.einsum("nck,cnd->knd", vectors * values.clamp_min(0).sqrt().unsqueeze(1), jacobian(w))


def kronecker_layers(w: Workload) -> dict[str, nn.Module]:
    """The linear and convolutional layers."""
    return {name: m for name, m in w.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def in_kronecker_layers(w: Workload) -> Tensor:
    """``(d,)``, which entries of the flat vector belong to them; the other parameters are nobody's common ground."""
    named = {f"{layer}.{p}" for layer, m in kronecker_layers(w).items() for p, _ in m.named_parameters()}
    return torch.cat([torch.full((p.numel(),), name in named) for name, p in w.parameters.items()])


def factors(w: Workload) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer to ``(a, g)``: second moments of (input, 1) summed over positions, of output gradients averaged over
    them.
    """
    layers, seen = kronecker_layers(w), {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)})) for name, m in layers.items()
    ]
    outputs = w.model(w.inputs)
    for hook in hooks:
        hook.remove()
    values, vectors = torch.linalg.eigh(metric(w))
    roots = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).permute(2, 0, 1)
    result = {}
    for name, m in layers.items():
        x, out = seen[name]
        gs = torch.stack([torch.autograd.grad(outputs, out, v, retain_graph=True)[0] for v in roots])
        if isinstance(m, nn.Conv2d):
            x = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2)
            gs = gs.flatten(3).transpose(2, 3)
        x, positions = x.detach().flatten(0, -2), x[0].numel() // x.shape[-1]
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gs = gs.flatten(0, -2)
        result[name] = (x.T @ x / w.n, gs.T @ gs / w.n / positions)
    return result


def in_layers(w: Workload, act) -> Tensor:
    """A flat vector from ``act(name, matrix [o, i + 1])`` over the Kronecker layers of the workload's direction; 0
    elsewhere.
    """
    parts = dict(zip(w.parameters, w.vector().split([p.numel() for p in w.parameters.values()])))
    out = {name: torch.zeros_like(v) for name, v in parts.items()}
    for name in kronecker_layers(w):
        weight, bias = parts[f"{name}.weight"], parts[f"{name}.bias"]
        matrix = act(name, torch.cat([weight.view(len(bias), -1), bias[:, None]], 1))
        out[f"{name}.weight"], out[f"{name}.bias"] = matrix[:, :-1].flatten(), matrix[:, -1]
    return torch.cat([out[name] for name in parts])


def kfac_times(w: Workload) -> Tensor:
    """``G V A``."""
    fs = factors(w)
    return in_layers(w, lambda name, v: fs[name][1] @ v @ fs[name][0])


def kfac_solve(w: Workload) -> Tensor:
    """``(G + sqrt(x) / pi)^-1 V (A + pi sqrt(x))^-1``."""
    fs, root = factors(w), 0.1

    def act(name, v):
        a, g = fs[name]
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        return (
            torch.linalg.inv(g + root / pi * torch.eye(len(g), dtype=g.dtype))
            @ v
            @ torch.linalg.inv(a + pi * root * torch.eye(len(a), dtype=a.dtype))
        )

    return in_layers(w, act)


def ekfac_times(w: Workload) -> Tensor:
    """``U (s * (U^T v))`` with the mean squares ``s`` of the rows along the eigenvectors of the factors."""
    fs, rows = factors(w), fisher_rows(w)
    sizes = [p.numel() for p in w.parameters.values()]
    parts = dict(zip(w.parameters, rows.split(sizes, -1)))

    def act(name, v):
        ua, ug = (torch.linalg.eigh(f)[1] for f in fs[name])
        weight, bias = parts[f"{name}.weight"], parts[f"{name}.bias"]
        j = torch.cat([weight.unflatten(-1, (bias.shape[-1], -1)), bias.unsqueeze(-1)], -1)
        s = (ug.T @ j @ ua).square().sum((0, 1)) / w.n
        return ug @ (s * (ug.T @ v @ ua)) @ ua.T

    return in_layers(w, act)


def loss_gradients(w: Workload) -> Tensor:
    """``(n d,)``."""
    parameters = list(w.model.parameters())
    grads = [
        torch.autograd.grad(F.cross_entropy(w.model(x[None]), y[None]), parameters) for x, y in zip(w.inputs, w.targets)
    ]
    return torch.cat([g.flatten() for gs in grads for g in gs])


def penalty_step(w: Workload) -> Tensor:
    """Gradient of the mean loss plus 1e-3 times the mean over examples of ``|J_n|^2``."""
    loss = F.cross_entropy(w.model(w.inputs), w.targets) + 1e-3 * jacobian(w, create_graph=True).square().sum() / w.n
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(w.model.parameters()), materialize_grads=True)]
    )


def gram(w: Workload) -> Tensor:
    """``J J^T``, flat."""
    rows = jacobian(w).flatten(0, 1)
    return (rows @ rows.T).flatten()


TRUTHS = {
    "J1": lambda w: fisher_rows(w).square().sum((0, 1)) / w.n,
    "J2": kfac_times,
    "J3": lambda w: torch.cat(
        [(a / a.norm()).flatten() for a in (a[:-1, :-1] for a, _ in factors(w).values())]
    ),  # not all have the bias inside
    "J4": ekfac_times,
    "J5": lambda w: jacobian(w).flatten(),
    "J6": gram,
    "J7": lambda w: jacobian(w).square().sum().reshape(1),
    "J8": lambda w: torch.einsum("knd,kn->d", (rows := fisher_rows(w)), rows @ w.vector()) / w.n,
    "J9": loss_gradients,
    "J10": kfac_solve,
    "J11": penalty_step,
}
COMPARED_IN_LAYERS = {"J2", "J4", "J10"}
RANDOM = {"nngeom (one random probe)"}


def disagreement(job: str, w: Workload, result: Tensor, expected: Tensor) -> float:
    """Relative error of a contender's canonical result."""
    if job in COMPARED_IN_LAYERS:
        keep = in_kronecker_layers(w)
        result, expected = result[keep], expected[keep]
    return float((result.double() - expected).norm() / expected.norm())

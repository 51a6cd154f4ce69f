"""Alignment of kernels with each other and with the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.kernel import above_rounding, center, kernel_tensor
from nngeom.analysis.rows import Function, Probe, layer_kernel, require_labels, row_products
from nngeom.core import memory
from nngeom.core.errors import ArgumentError, OutputError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.tiles import Side
from nngeom.metrics.loss import IdentityMetric
from nngeom.pmat.recipe import join_rows
from nngeom.space.collection import LayerCollection


def alignment(K: Any, L: Any, centered: bool | str = True) -> Tensor:
    """``<K, L>_F / (|K|_F |L|_F)`` of two kernels: CKA on centred kernels, kernel alignment on uncentred ones.

    ``K`` and ``L``: FMats, tensors ``(c, n, c, m)`` or matrices. ``centered=True`` (``"features"``) subtracts the mean feature
    output by output; ``"global"`` the mean over all entries, as the formula of the paper says; ``False`` nothing.
    In [0, 1] for positive semi-definite kernels, invariant to scaling, to a joint permutation of the examples and to orthogonal
    maps of the features. NaN where a (centred) kernel is zero.

    Raises :class:`ArgumentError` where shapes differ. Source: Cortes et al. 2012; Kornblith et al. 2019; Baratin et al. 2021, eq. 7.
    """
    k, m = kernel_tensor(K), kernel_tensor(L)
    if k.shape != m.shape:
        raise ArgumentError(f"the kernels have shapes {tuple(k.shape)} and {tuple(m.shape)}; expected equal ones")
    x, y = center(k, centered), center(m.to(k), centered)
    return _ratio((x * y).sum(), x.norm() * y.norm())


def hsic(K: Any, L: Any) -> Tensor:
    """``<K_c, L_c>_F``: the alignment before it is normalised, features centred output by output."""
    return (center(K) * center(kernel_tensor(L).to(kernel_tensor(K)))).sum()


def label_kernel(y: Tensor, c: int, dtype: torch.dtype | None = None) -> FMatDense:
    """``Y Y^T``, ``(c, n, c, n)``: the rank-one kernel of the concatenated labels ``Y`` of :func:`label_vector`."""
    v = label_vector(y, c, dtype)
    return FMatDense(v[:, :, None, None] * v[None, None])


def label_vector(y: Tensor, c: int, dtype: torch.dtype | None = None) -> Tensor:
    """``(c, n)``: one-hot class labels; with one output -1 and 1; floating-point targets ``(n, *shape)`` as they are.

    Class labels of positions, ``(n, *positions)``, are one-hot along the first output axis, ``c = classes * positions``.
    """
    dtype = dtype if dtype is not None else torch.get_default_dtype()
    n = y.shape[0]
    if y.is_floating_point():
        flat = y.reshape(n, -1)
        if flat.shape[1] != c:
            raise OutputError(f"the targets have {flat.shape[1]} numbers an example; the model has {c} outputs")
        return flat.T.to(dtype)
    if c == 1 and y.numel() == n:
        return torch.where(y.reshape(1, n) > 0, 1.0, -1.0).to(dtype)
    positions = y.reshape(n, -1)
    classes = c // positions.shape[1]
    if classes * positions.shape[1] != c or (y.numel() and not (0 <= int(y.min()) and int(y.max()) < classes)):
        raise OutputError(f"labels of shape {tuple(y.shape)} between {int(y.min())} and {int(y.max())} do not fit {c} outputs")
    return (positions[:, None, :] == torch.arange(classes, device=y.device)[None, :, None]).reshape(n, c).T.to(dtype)


def kernel_label_alignment(K: Any, y: Tensor, centered: bool | str = True) -> Tensor:
    """:func:`alignment` of a kernel at hand with the labels ``y``, as ``Y^T K Y / (|K|_F |Y|^2)``."""
    k = center(K, centered)
    v = _centered(label_vector(y, k.shape[0], k.dtype).to(k.device), centered)
    if v.shape[1] != k.shape[1] or k.shape[1] != k.shape[3]:
        raise ArgumentError(f"the kernel is {tuple(k.shape)} and there are {v.shape[1]} labels; expected one set of examples")
    return _ratio(torch.einsum("cn,cndm,dm->", v, k, v), k.norm() * v.square().sum())


def group_alignment(K: Any, y: Tensor, groups: Mapping[str, Tensor], centered: bool | str = True) -> dict[str, Tensor]:
    """Label alignment of the kernel restricted to subsets of its examples (easy and hard ones): masks or indices by name."""
    k = kernel_tensor(K)
    out = {}
    for name, index in groups.items():
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        out[name] = kernel_label_alignment(k[:, index][:, :, :, index], y[index], centered)
    return out


def label_alignment(
    model: nn.Module,
    loader: Any,
    centered: bool = True,
    by_layer: bool = False,
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
) -> Any:
    """CKA (``centered``) or kernel alignment of the tangent kernel with the labels: a scalar, or ``{layer: scalar}``.

    Parameters fewer than ``n c`` are treated in parameter space, by their ``(p, p)`` second moment, so that no
    ``n c x n c`` product is made; others by their kernel, one layer at a time.

    Raises :class:`LoaderError` without labels, :class:`OutputError` where they do not fit the outputs, and what the
    sweep raises. Source: Baratin et al. 2021, sections 3.2 and 3.3.
    """
    if not isinstance(centered, bool):
        raise ArgumentError(f"centered is {centered!r}; expected True or False (for others see kernel_label_alignment)")
    probe = Probe.build(model, loader, function, layer_collection)
    collection, y = probe.task.collection, require_labels(probe)
    parts = collection.by_layer() if by_layer else {"": collection.names}
    with memory.limit(memory_budget), torch.no_grad():
        side = probe.side(IdentityMetric(), check, memory_budget)
        v = _centered(label_vector(y, side.outputs, side.dtype), centered)
        values = {name: _aligned(side, name, names, v, centered) for name, names in parts.items()}
    return values if by_layer else values[""]


def _aligned(side: Side, layer: str, names: tuple[str, ...], v: Tensor, centered: bool) -> Tensor:
    layout = side.sweep.task.collection.span(names)
    if layout.numel >= v.numel():
        k = center(layer_kernel(side, layer, len(v)) if layer else row_products(side), centered)
        return _ratio(torch.einsum("cn,cndm,dm->", v, k, v), k.norm() * v.square().sum())
    second, signal = v.new_zeros(layout.numel, layout.numel), v.new_zeros(layout.numel)
    sums = v.new_zeros(v.shape[0], layout.numel)
    for chunk in (c for group in side.groups() for c in group.chunks):
        y, n = chunk.outputs[0], chunk.start
        for rows in join_rows(chunk, layout, names):
            c, m, _ = rows.shape
            second += rows.flatten(0, 1).T @ rows.flatten(0, 1)
            sums[y : y + c] += rows.sum(1)
            signal += torch.einsum("knp,kn->p", rows, v[y : y + c, n : n + m])
            n += m
    if centered:
        second = above_rounding(second - sums.T @ sums / v.shape[1], second)
    return _ratio(signal.square().sum(), second.norm() * v.square().sum())


def _centered(v: Tensor, how: bool | str) -> Tensor:
    if how is False:
        return v
    return v - v.mean() if how == "global" else v - v.mean(1, keepdim=True)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return top / bottom if bool(bottom > 0) else torch.full_like(top, float("nan"))

"""Alignment of kernels with each other and with the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.kernel import above_rounding, center, kernel_tensor
from nngeom.analysis.labelled import Labelled
from nngeom.analysis.labels import signs
from nngeom.analysis.rows import layer_kernel, row_products
from nngeom.capture.network import Network
from nngeom.core.errors import ArgumentError, OutputError
from nngeom.core.given_plainly import require_real_tensor, require_whole
from nngeom.cotangents.categorical import Categorical
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.side import Side
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run


def alignment(K: Any, L: Any, centered: bool | str = True) -> Tensor:
    """``<K, L>_F / (|K|_F |L|_F)`` of two kernels: CKA on centred kernels, kernel alignment on uncentred ones.

    ``K`` and ``L``: FMats, tensors ``(c, n, c, m)`` or matrices. ``centered=True`` (``"features"``) subtracts the mean
    feature output by output; ``"global"`` the mean over all entries, as the formula of the paper says; ``False``
    nothing. In [0, 1] for positive semi-definite kernels, invariant to scaling, to a joint permutation of the examples
    and to orthogonal maps of the features. NaN where a (centred) kernel is zero.

    Raises :class:`ArgumentError` where shapes differ. Source: Cortes et al. 2012; Kornblith et al. 2019; Baratin et al.
    2021, eq. 7.
    """
    k, m = _pair(K, L)
    x, y = center(k, how=centered), center(m.to(k), how=centered)
    return _ratio((x * y).sum(), x.norm() * y.norm())


def hsic(K: Any, L: Any) -> Tensor:
    """``<K_c, L_c>_F``: the alignment before it is normalised, features centred output by output.

    ``K``, ``L``: kernels of the same points, FMats or tensors ``(c, n, c, n)``.
    """
    k, m = _pair(K, L)
    return (center(k) * center(m.to(k))).sum()


def _pair(K: Any, L: Any) -> tuple[Tensor, Tensor]:
    k, m = kernel_tensor(K), kernel_tensor(L)
    if k.shape != m.shape:
        raise ArgumentError(f"the kernels have shapes {tuple(k.shape)} and {tuple(m.shape)}; expected equal ones")
    return k, m


def label_kernel(y: Tensor, c: int, dtype: torch.dtype | None = None) -> FMatDense:
    """``Y Y^T``, ``(c, n, c, n)``: the rank-one kernel of the concatenated labels ``Y`` of :func:`label_vector`.

    ``y``: labels as :func:`label_vector` takes them, of ``c`` outputs; ``dtype``: of the kernel (torch's default unless
    given).
    """
    v = label_vector(y, c, dtype)
    return FMatDense(v[:, :, None, None] * v[None, None])


def label_vector(y: Tensor, c: int, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """``(c, n)``: one-hot class labels; with one output -1 and 1; floating-point targets ``(n, *shape)`` as they are.

    ``y``: the labels, one an example or position; ``c``: the number of outputs; ``dtype``: of the result (torch's
    default unless given). Class labels of positions, ``(n, *positions)``, are one-hot along the axis that they lack in
    outputs ``(n, *shape)``, or without ``shape`` along the first output axis, ``c = classes * positions``. Raises
    :class:`OutputError` for labels that do not fit, as integers other than 0 and 1, or -1 and 1, with one output.
    """
    dtype = dtype if dtype is not None else torch.get_default_dtype()
    require_real_tensor(y, "y")
    if y.ndim == 0:
        raise OutputError("y is a single number; expected one label an example, (n,)")
    require_whole(c, "c")
    n = y.shape[0]
    if y.is_floating_point():
        flat = y.reshape(n, -1)
        if flat.shape[1] != c:
            raise OutputError(f"the targets have {flat.shape[1]} numbers an example; the model has {c} outputs")
        return flat.T.to(dtype)
    if c == 1 and y.numel() == n:
        return signs(y, n, "a label vector").to(y.device, dtype).unsqueeze(0)
    positions = y.reshape(n, -1)
    classes = c // positions.shape[1]
    if classes * positions.shape[1] != c or (y.numel() and not (0 <= int(y.min()) and int(y.max()) < classes)):
        span = f"between {int(y.min())} and {int(y.max())}"
        raise OutputError(f"labels of shape {tuple(y.shape)} {span} do not fit {c} outputs")
    axis = 1 if shape is None or len(shape) == 1 else Categorical().fit(torch.empty(n, *shape, device="meta"), y).dim
    hot = (y.unsqueeze(-1) if positions.shape[1] > 1 else positions) == torch.arange(classes, device=y.device)
    return hot.movedim(-1, 1 if axis is None else axis).reshape(n, c).T.to(dtype)


def kernel_label_alignment(
    K: Any, y: Tensor, *, centered: bool | str = True, shape: Sequence[int] | None = None
) -> Tensor:
    """:func:`alignment` of a kernel at hand with the labels ``y``, as ``Y^T K Y / (|K|_F |Y|^2)``.

    ``centered``: as for :func:`alignment`. ``shape`` of an example's outputs, for labels of positions: see
    :func:`label_vector`.
    """
    k = center(K, how=centered)
    v = _centered(label_vector(y, k.shape[0], k.dtype, shape).to(k.device), how=centered)
    if v.shape[1] != k.shape[1] or k.shape[1] != k.shape[3]:
        raise ArgumentError(
            f"the kernel is {tuple(k.shape)} and there are {v.shape[1]} labels; expected one set of examples"
        )
    return _ratio(torch.einsum("cn,cndm,dm->", v, k, v), k.norm() * v.square().sum())


def group_alignment(
    K: Any, y: Tensor, groups: Mapping[str, Tensor], *, centered: bool | str = True
) -> dict[str, Tensor]:
    """Label alignment of the kernel restricted to subsets of its examples (easy and hard ones), by name.

    ``K`` ``(c, n, c, n)``, labels ``y`` as for :func:`label_vector`, ``centered`` as for :func:`alignment`. ``groups``:
    boolean masks ``(n,)``, or integer indices; NaN for one without examples. Raises :class:`ArgumentError` for a mask
    of another length or of numbers, and for indices out of range.
    """
    k = kernel_tensor(K)
    out = {}
    for name, members in groups.items():
        index = _members(name, torch.as_tensor(members, device=k.device), k.shape[1])
        chosen, own = k[:, index][:, :, :, index], y[index.to(y.device)]
        out[name] = kernel_label_alignment(chosen, own, centered=centered) if len(index) else k.new_tensor(torch.nan)
    return out


def _members(name: str, given: Tensor, n: int) -> Tensor:
    """The indices of a group."""
    if given.dtype == torch.bool and given.shape == (n,):
        return given.nonzero().flatten()
    whole = given.numel() == 0 or given.dtype in (torch.int16, torch.int32, torch.int64)
    if given.ndim != 1 or not whole or bool(((given < -n) | (given >= n)).any()):
        raise ArgumentError(
            f"group {name!r} is a {given.dtype} tensor {tuple(given.shape)}; expected a boolean mask ({n},), or "
            f"integer indices below {n}"
        )
    return given.long()


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
    process_group: Any = None,
) -> Any:
    """CKA (``centered``) or kernel alignment of the tangent kernel with the labels: a scalar, or with ``by_layer``
    ``{layer: scalar}``.

    Parameters fewer than ``n c`` are treated in parameter space, by their ``(p, p)`` second moment, so that no
    ``n c x n c`` product is made; others by their kernel, one layer at a time, which with a ``process_group`` is whole
    on every process.

    Raises :class:`LoaderError` without labels, :class:`OutputError` where they do not fit the outputs, and what the
    sweep raises. Source: Baratin et al. 2021, sections 3.2 and 3.3.
    """
    if not isinstance(centered, bool):
        raise ArgumentError(f"centered is {centered!r}; expected True or False (for others see kernel_label_alignment)")
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    agree(run, "label_alignment", centered=centered, by_layer=by_layer)
    collection = run.network.collection
    parts = collection.by_layer() if by_layer else {"": collection.names}
    with run.within(), torch.no_grad():
        data = Labelled.of(run)
        v = _centered(label_vector(data.labels, data.outputs, data.dtype, data.shape), how=centered)
        values = {name: _aligned(data, name, names, v, centered=centered) for name, names in parts.items()}
    return values if by_layer else values[""]


def _aligned(data: Labelled, layer: str, names: tuple[str, ...], v: Tensor, *, centered: bool) -> Tensor:
    side = data.side
    layout = side.run.network.collection.span(names)
    if layout.numel >= v.numel():
        one = layer and side.run.team.size == 1
        k = center(layer_kernel(side, layer, len(v)) if one else row_products(_of_layer(side, names)), how=centered)
        return _ratio(torch.einsum("cn,cndm,dm->", v, k, v), k.norm() * v.square().sum())
    second, sums, signal = data.moments(layout, names, v)
    if centered:
        second = above_rounding(second - sums.T @ sums / v.shape[1], second)
    return _ratio(signal.square().sum(), second.norm() * v.square().sum())


def _of_layer(side: Side, names: Sequence[str]) -> Side:
    """The same rows of the parameters ``names`` alone."""
    network = side.run.network
    if len(names) == len(network.collection):
        return side
    network = Network.build(network.model, network.function, network.collection.only(names))
    return replace(side, sweep=replace(side.sweep, run=replace(side.run, network=network)))


def _centered(v: Tensor, *, how: bool | str) -> Tensor:
    if how is False:
        return v
    return v - v.mean() if how == "global" else v - v.mean(1, keepdim=True)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return top / bottom if bool(bottom > 0) else torch.full_like(top, float("nan"))

"""The Jacobian of a model, as a map between its parameters and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentTypeError
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.jacobian_products import first_look
from nngeom.fmat.side import Side
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit, dense_rows
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

J = TypeVar("J", bound=JacobianMap, default=PushForwardDense)


def Jacobian(
    model: nn.Module,
    loader: Any,
    representation: type[J] = PushForwardDense,  # type: ignore[assignment]
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> J:
    """The Jacobian of all outputs at all examples, ``(c, n, d)``, as a map between parameter and function space.

    ``representation``: ``PushForwardDense`` or ``PushForwardImplicit`` (``J v``), ``PullBackDense`` or
    ``PullBackImplicit`` (``J^T u``); ``.T`` links them. ``J @ J.T`` is a kernel, ``J.T @ J`` a matrix over the
    parameters. Other arguments and errors as :func:`GramMatrix`.
    """
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    run.require_alone("Jacobian")
    kind: Any = representation
    with run.within():
        side = Side.of(run, EveryOutput(), Policy("Jacobian"))
        if kind in (PushForwardImplicit, PullBackImplicit):
            first_look(side)
            return cast(J, kind(side))
        if kind not in (PushForwardDense, PullBackDense):
            raise ArgumentTypeError(
                f"representation is {representation!r}; expected PushForwardDense, PushForwardImplicit, "
                "PullBackDense or PullBackImplicit"
            )
        return cast(J, kind(run.network.collection, dense_rows(side)))

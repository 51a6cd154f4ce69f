"""The Jacobian of a model, as a map between its parameters and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.jacobian_products import first_look
from nngeom.fmat.places import Places
from nngeom.fmat.side import Side
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit, dense_rows, own_rows
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.maps.mapped import MappedPush
from nngeom.maps.sharded import PullBackSharded, PushForwardSharded
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

J = TypeVar("J", bound=JacobianMap, default=PushForwardDense)


SHARDED: dict[Any, Any] = {PushForwardDense: PushForwardSharded, PullBackDense: PullBackSharded}


# fmt: off
@overload
def Jacobian(model: nn.Module, loader: Any, representation: type[J] = ..., *,
        centered: bool = False, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None, sharded: Literal[False] = False) -> J: ...
@overload
def Jacobian(model: nn.Module, loader: Any, representation: type[PushForwardDense] = PushForwardDense, *,
        centered: bool = False, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None, sharded: Literal[True]) -> PushForwardSharded: ...
@overload
def Jacobian(model: nn.Module, loader: Any, representation: type[PullBackDense], *,
        centered: bool = False, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None, sharded: Literal[True]) -> PullBackSharded: ...
# fmt: on
def Jacobian(
    model: nn.Module,
    loader: Any,
    representation: Any = PushForwardDense,
    *,
    centered: bool = False,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    sharded: bool = False,
) -> Any:
    """The Jacobian of all outputs at all examples, ``(c, n, d)``, as a map between parameter and function space.

    ``representation``: ``PushForwardDense`` or ``PushForwardImplicit`` (``J v``), ``PullBackDense`` or
    ``PullBackImplicit`` (``J^T u``); ``.T`` links them. ``J @ J.T`` is a kernel, ``J.T @ J`` a matrix over the
    parameters. ``centered``: the mean gradient of each output over the examples is taken from its rows. ``sharded``:
    over the processes of ``process_group`` each keeps the rows of its own examples, a ``PushForwardSharded`` or
    ``PullBackSharded``, of dense ones only. Other arguments and errors as :func:`GramMatrix`.
    """
    run = Run.gathering(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    kind: Any = representation
    with run.within():
        agree(run, "Jacobian", representation=representation, centered=centered, sharded=sharded)
        if sharded and kind not in SHARDED:
            raise ArgumentError("sharded=True is of PushForwardDense or PullBackDense; implicit maps keep no rows")
        with run.team.together("batches"):
            side = Side.of(run, EveryOutput(), Policy("Jacobian"))
        if sharded:
            return SHARDED[kind](run.network.collection, *_strip(side, centered=centered))
        side = side.placed()
        if kind in (PushForwardImplicit, PullBackImplicit):
            first_look(side)
            return kind(side) if not centered else without_mean(side, pushes=kind.pushes)
        if kind not in (PushForwardDense, PullBackDense):
            raise ArgumentTypeError(
                f"representation is {representation!r}; expected PushForwardDense, PushForwardImplicit, "
                "PullBackDense or PullBackImplicit"
            )
        rows = dense_rows(side.widened() if centered else side)
        if centered:
            rows = without_mean_(rows).to(side.dtype)
        return kind(run.network.collection, rows)


def _strip(side: Side, *, centered: bool) -> tuple[Tensor, Places]:
    """The rows of this process's examples, and where these lie among all."""
    side = side.placed()
    places = side.places or Places.of(side)
    rows = own_rows(side.widened() if centered else side)
    return (places.less_mean(rows) if centered else rows).to(side.dtype), places


def without_mean_(rows: Tensor) -> Tensor:
    """Rows ``(c, n, d)`` less their mean over examples, in place."""
    return rows.sub_(rows.mean(1, keepdim=True)) if rows.numel() else rows


def without_mean(side: Side, *, pushes: bool) -> JacobianMap:
    """The implicit map of centred rows, or its transpose: centring acts on functions, ``C J``."""
    act = lambda u: FVector(u.tensor - u.tensor.mean(-1, keepdim=True)) if u.tensor.numel() else u
    push = MappedPush(PushForwardImplicit(side), act, act, side.everywhere)
    return push if pushes else push.T

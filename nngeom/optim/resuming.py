"""The state of an optimizer: what decides the coming steps, as plain values and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nngeom.core.errors import ArgumentError
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt

if TYPE_CHECKING:
    from nngeom.optim.natural_gradient import NaturalGradient


def with_curvature(state: dict[str, Any], opt: NaturalGradient) -> dict[str, Any]:
    """The state that any optimizer has, without callables, and the curvature."""
    state["param_groups"] = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    state["curvature"] = {
        "steps": opt.clock.steps,
        "skipped": opt.skipped,
        "refreshed": opt.clock.refreshed,
        "drawn": opt.observer.drawn,
        "reduction": opt.reduction,
        "damping": opt.damping.value if isinstance(opt.damping, LevenbergMarquardt) else None,
        "batchwise": sorted(opt.observer.batchwise),
        "parts": opt.partition.state(),
    }
    return state


def without_curvature(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What any optimizer loads; callables of the present groups stay. Raises :class:`ArgumentError` for a state of
    another kind.
    """
    if "curvature" not in state:
        raise ArgumentError("the state holds no curvature; expected the state_dict() of the same kind of optimizer")
    merged = [
        {**{k: v for k, v in mine.items() if callable(v)}, **group}
        for mine, group in zip(groups, state["param_groups"])
    ]
    return {**{k: v for k, v in state.items() if k != "curvature"}, "param_groups": merged}


def restore(opt: NaturalGradient, saved: dict[str, Any]) -> None:
    """The curvature that :func:`with_curvature` saved."""
    opt.clock.steps, opt.clock.refreshed, opt.observer.drawn = saved["steps"], saved["refreshed"], saved["drawn"]
    opt.pending.reduction, opt.pending.skipped = saved["reduction"], saved["skipped"]
    opt.observer.batchwise.update(saved["batchwise"])
    if saved["damping"] is not None and isinstance(opt.damping, LevenbergMarquardt):
        opt.damping.value = saved["damping"]
    opt.partition.load(saved["parts"])

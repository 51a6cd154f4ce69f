"""An optimizer that observes the curvature of a model in training and preconditions its gradients by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, NonFiniteError, PeerError, SingularError
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.whole import whole
from nngeom.optim.automatic import Automatic
from nngeom.optim.bound import Bound
from nngeom.optim.causes import cause
from nngeom.optim.descent import descend
from nngeom.optim.fallback import Fallback, natural
from nngeom.optim.gradients import Gradients
from nngeom.optim.groups import plain, resumed
from nngeom.optim.intake import Intake
from nngeom.optim.joint import Joint, is_curvature
from nngeom.optim.model_check import ModelCheck
from nngeom.optim.observing import Observing
from nngeom.optim.partition import Partition
from nngeom.optim.pending import Pending, Seen
from nngeom.optim.quadratic import QuadraticModel, added, require_quadratic
from nngeom.optim.schedule import Clock
from nngeom.optim.states import converted
from nngeom.sweep.observe import Observation, Observer


class Preconditioned(torch.optim.Optimizer):
    """All of an optimizer but its step."""

    _step_supports_amp_scaling = True  # GradScaler hands its scale over instead of dividing the gradients itself

    clock: Clock
    pending: Pending
    observer: Observer
    partition: Partition
    gradients: Gradients
    bound: Bound
    check: ModelCheck
    intake: Intake
    automatic: Automatic
    fallback: Fallback
    joint: Joint
    sharded: bool  # the model is under ``fully_shard``

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer: ``param_group`` has ``"params"`` and its own numbers; with ``"fallback": True`` AdamW
        steps it. Raises :class:`ArgumentError` for a parameter that is not in the collection, or is and has AdamW.
        """
        super().add_param_group(self.fallback.complete(param_group))
        by_fallback = bool(param_group.get("fallback"))
        known = set(map(id, self.fallback.outside.values() if by_fallback else self.gradients.parameters))
        odd = [tuple(p.shape) for p in self.param_groups[-1]["params"] if id(p) not in known]
        if odd:
            self.param_groups.pop()
            raise ArgumentError(
                f"params holds parameters of shapes {odd[:4]} inside the model's collection, in a group with "
                "'fallback': leave them out with layer_collection"
                if by_fallback
                else f"params holds parameters of shapes {odd[:4]} outside the model's collection; give those to "
                "another optimizer, or to AdamW inside of this one: fallback=dict(lr=...), or a group with "
                "'fallback': True"
            )

    # -- observing -----------------------------------------------------------------------------------------------------

    def observe(self, reduction: str | None = None, scaler: Any = None) -> AbstractContextManager[Observation]:
        """Watch one or several forward and backward passes of the model; blocks add up until the step or ``zero_grad``.

        ``reduction`` says how the losses are reduced over examples: ``"mean"`` (all that is backpropagated before the
        step sums to the mean over all its examples: divide by the number of passes when accumulating), ``"sum"``, or
        ``"token_mean"`` (the mean over all positions of all examples that have a gradient, as a language model's loss);
        default that of the constructor. A ``GradScaler`` is taken into account by itself, but for
        ``scaler.unscale_(opt)`` before the step: then pass it as ``scaler``.
        """
        return Observing(self.observer, self.intake, reduction, scaler, sharded=self.sharded)

    @property
    def reduction(self) -> str:
        """How losses are reduced over examples, as said last."""
        return self.pending.reduction

    @property
    def scaler(self) -> Any:
        """A ``GradScaler`` whose ``unscale_(opt)`` is called before the step, where passes are not in :meth:`observe`,
        which takes it.
        """
        return self.pending.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self.pending.scaler = scaler

    @property
    def skipped(self) -> int:
        """How many steps were skipped."""
        return self.pending.skipped

    @property
    def damping(self) -> Any:
        """As given: a number, a damping object, a callable of the step, :class:`LevenbergMarquardt` or
        :class:`VarianceDamping`.
        """
        return self.clock.damping

    @damping.setter
    def damping(self, damping: Any) -> None:
        self.clock.damping = damping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer (``set_to_none``: instead of zeros); also drops what was observed since the last step."""
        self._forget()
        if not set_to_none or torch.autograd._profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _forget(self) -> None:
        self.automatic.forget()

    # -- preconditioning -----------------------------------------------------------------------------------------------

    def precondition_(self) -> bool:
        """Rewrite ``.grad`` into ``(F + damping)^-1 grad``, so that any optimizer can take the step; ``False`` if it
        was skipped.
        """
        with torch.no_grad():
            self.automatic.collect()
            return self._precondition() is not None

    def _precondition(self) -> float | None:
        """The factor of clipping; ``None`` when the step is skipped."""
        schedule, flat = self.clock.now(), self.gradients.read()
        why = None
        if not math.isfinite(float(flat.sum())) or not all(part.finite() for part in self.partition):
            why = cause(self.pending.loss, self.observer.network.parameters, self.partition)
        seen = self.joint.seen(schedule, why)
        if not isinstance(seen, Seen):
            return self._skip(*seen)
        self.check.arrived(flat, seen.examples)
        try:
            self.joint.precondition(flat, seen, schedule)
        except (SingularError, NonFiniteError, PeerError) as error:
            if self.clock.steps == 0 or not is_curvature(error):
                raise
            return self._skip("curvature", str(error))
        if not any(part.known for part in self.partition):
            raise ArgumentError(
                "step() before anything was observed; expected the forward and backward pass inside `with "
                "opt.observe():`"
            )
        self.bound.measure(natural(self.param_groups), self.clock.steps, self.gradients)
        if not math.isfinite(self.bound.squared):
            return self._skip("curvature", "the preconditioned gradient is not finite")
        clip = self.bound.factor(schedule.kl_clip)
        self.gradients.write(clip)
        self.clock.tick(schedule)
        self.pending.forget()
        return clip

    def _move(self, gradient: Tensor | None, clip: float) -> float:
        """:func:`descend`, of directions that were made shorter by ``clip``; of some steps, where they led is kept for
        the check of the model.
        """
        slope = None if gradient is None else self.gradients.split(gradient)
        curved = None if slope is None else {p: clip * g for p, g in slope.items()}
        groups, step = natural(self.param_groups), self.clock.steps - 1
        if not self.check.stepped(self.bound):
            return descend(groups, self.state, step, curved, slope)
        before = [p.detach().clone() for p in self.gradients.parameters]
        predicted = descend(groups, self.state, step, curved, slope)
        moved = [whole(p.detach() - q) for p, q in zip(self.gradients.parameters, before)]
        self.check.step = torch.cat([x.flatten() for x in moved]).to(self.gradients.flat)
        return predicted

    def _quadratic(self, outputs: Callable[[], Any]) -> QuadraticModel:
        """That of the batch, checked."""
        groups = natural(self.param_groups)
        require_quadratic(self.observer, groups, self.clock.steps, self.reduction, sharded=self.sharded)
        now = self.clock.now()
        return QuadraticModel(self.observer, outputs, added(now.damping), now.kl_clip, self.joint.mean)

    def _move_lowest(self, model: QuadraticModel, gradient: Tensor) -> float | None:
        """To the minimum of a ``model``; ``None`` when the step is skipped."""
        predicted = model.descend(self.gradients, gradient, natural(self.param_groups), self.state)
        return self._skip("curvature", "the quadratic model is not finite") if predicted is None else predicted

    def _skip(self, kind: str, why: str) -> float | None:
        self._forget()
        self.pending.skip(kind, why)
        return None

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the coming steps, as tensors, numbers, strings, lists and dicts; callables are not
        part of it.

        What was observed since the last step is not saved; damping (but that of :class:`LevenbergMarquardt`), decays
        and intervals are those of the constructor.
        """
        state = super().state_dict()
        curvature = self.clock.state() | self.pending.state() | self.observer.state()
        curvature["parts"] = self.partition.state()
        return {**state, "param_groups": plain(state["param_groups"]), "curvature": curvature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a copy of a ``state_dict``: the steps that follow are the same, bit by bit. Callables stay those
        of this optimizer. In a model of another dtype, or on another device, they go on in that. Raises
        :class:`ArgumentError` for the state of another kind of optimizer, or of another model.
        """
        parts = state_dict.get("curvature") if isinstance(state_dict, Mapping) else None
        if not isinstance(parts, Mapping) or "parts" not in parts:
            raise ArgumentError("the state holds no curvature; expected the state_dict() of the same kind of optimizer")
        state = copy.deepcopy(dict(state_dict))
        saved = state.pop("curvature")
        groups = resumed(self.param_groups, state.get("param_groups"))
        dtypes = {accumulation_dtype(p.dtype) for p in self.gradients.parameters}
        self.partition.load(converted(saved["parts"], dtypes, self.gradients.flat))
        super().load_state_dict({**state, "param_groups": groups})
        self.clock.load(saved)
        self.pending.load(saved)
        self.observer.load(saved)

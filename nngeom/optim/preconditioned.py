"""An optimizer that observes the curvature of a model in training and preconditions its gradients by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, NonFiniteError, SingularError
from nngeom.optim.arguments import as_reduction
from nngeom.optim.bound import Bound
from nngeom.optim.descent import descend
from nngeom.optim.gradients import Gradients
from nngeom.optim.groups import plain, resumed
from nngeom.optim.model_check import ModelCheck
from nngeom.optim.partition import Partition
from nngeom.optim.pending import Pending
from nngeom.optim.replicas import alone
from nngeom.optim.schedule import Clock
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer: ``param_group`` has ``"params"`` and its own numbers; raises :class:`ArgumentError` for
        a parameter outside the collection.
        """
        super().add_param_group(param_group)
        known = set(map(id, self.gradients.parameters))
        odd = [tuple(p.shape) for p in self.param_groups[-1]["params"] if id(p) not in known]
        if odd:
            self.param_groups.pop()
            raise ArgumentError(
                f"params holds parameters of shapes {odd[:4]} outside the model's collection; give those to "
                "another optimizer"
            )

    # -- observing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def observe(self, reduction: str | None = None, scaler: Any = None) -> Iterator[Observation]:
        """Watch one or several forward and backward passes of the model; blocks add up until the step or ``zero_grad``.

        ``reduction`` says how the losses are reduced over examples: ``"mean"`` (all that is backpropagated before the
        step sums to the mean over all its examples: divide by the number of passes when accumulating), or ``"sum"``;
        default that of the constructor. A ``GradScaler`` is taken into account by itself, but for
        ``scaler.unscale_(opt)`` before the step: then pass it as ``scaler``.
        """
        schedule = self.clock.now()
        if reduction is not None:
            self.pending.reduction = as_reduction(reduction)
        record = schedule.statistics or self.partition.wants_every_batch
        with alone(self.observer.network.model), self.observer.watch(record=record) as observation:
            yield observation
        with torch.no_grad():
            for chunk in observation.chunks:
                self.partition.observe(chunk, schedule)
        observation.chunks.clear()
        self.pending.take(observation.examples, scaler)

    @property
    def reduction(self) -> str:
        """How losses are reduced over examples, as said last."""
        return self.pending.reduction

    @property
    def skipped(self) -> int:
        """How many steps were skipped."""
        return self.pending.skipped

    @property
    def damping(self) -> Any:
        """As given: a number, a damping object, a callable of the step, or :class:`LevenbergMarquardt`."""
        return self.clock.damping

    @damping.setter
    def damping(self, damping: Any) -> None:
        self.clock.damping = damping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer (``set_to_none``: instead of zeros); also drops what was observed since the last step."""
        self._forget()
        super().zero_grad(set_to_none)

    def _forget(self) -> None:
        self.partition.forget()
        self.pending.forget()

    # -- preconditioning -----------------------------------------------------------------------------------------------

    def precondition_(self) -> bool:
        """Rewrite ``.grad`` into ``(F + damping)^-1 grad``, so that any optimizer can take the step; ``False`` if it
        was skipped.
        """
        with torch.no_grad():
            return self._precondition() is not None

    def _precondition(self) -> float | None:
        """The factor of clipping; ``None`` when the step is skipped."""
        schedule, flat = self.clock.now(), self.gradients.read()
        if not bool(torch.isfinite(flat.sum())) or not all(part.finite() for part in self.partition):
            return self._skip("gradients or statistics are not finite")
        seen = self.pending.seen(own_loss=self.observer.cotangents is None)
        self.check.arrived(flat, seen.examples)
        try:
            for part in self.partition:
                part.precondition(flat, seen, schedule)
        except (SingularError, NonFiniteError) as error:
            if self.clock.steps == 0:
                raise
            return self._skip(str(error))
        if not any(part.blocks for part in self.partition):
            raise ArgumentError(
                "step() before anything was observed; expected the forward and backward pass inside `with "
                "opt.observe():`"
            )
        if not bool(torch.isfinite(flat.sum())):
            return self._skip("the preconditioned gradient is not finite")
        self.bound.measure(self.param_groups, self.clock.steps, self.gradients.split(flat))
        clip = self.bound.factor(schedule.kl_clip)
        if clip < 1:
            flat.mul_(clip)
        self.gradients.write()
        self.clock.tick(schedule)
        self.pending.forget()
        return clip

    def _move(self, curved: Mapping[Tensor, Tensor] | None, gradient: Mapping[Tensor, Tensor] | None) -> float:
        """:func:`descend`; of some steps, where they led is kept for the check of the model."""
        if not self.check.stepped(self.bound):
            return descend(self.param_groups, self.state, self.clock.steps - 1, curved, gradient)
        before = [p.detach().clone() for p in self.gradients.parameters]
        predicted = descend(self.param_groups, self.state, self.clock.steps - 1, curved, gradient)
        moved = torch._foreach_sub([p.detach() for p in self.gradients.parameters], before)
        self.check.step = torch.cat([x.flatten() for x in moved]).to(self.gradients.flat)
        return predicted

    def _skip(self, why: str) -> float | None:
        self._forget()
        self.pending.skip(why)
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
        """Resume from a ``state_dict``: the steps that follow are the same, bit by bit. Callables stay those of this
        optimizer.
        """
        if "curvature" not in state_dict:
            raise ArgumentError("the state holds no curvature; expected the state_dict() of the same kind of optimizer")
        state = {key: value for key, value in state_dict.items() if key != "curvature"}
        super().load_state_dict({**state, "param_groups": resumed(self.param_groups, state["param_groups"])})
        saved = state_dict["curvature"]
        self.clock.load(saved)
        self.pending.load(saved)
        self.observer.load(saved)
        self.partition.load(saved["parts"])

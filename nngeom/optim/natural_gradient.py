"""Natural-gradient descent with any representation of the Fisher matrix as preconditioner."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.damping import Damping, FactoredTikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError, NonFiniteError, SingularError
from nngeom.core.linalg import accumulation_dtype
from nngeom.generator.observe import Observation, Observer
from nngeom.generator.sweep import Chunk, Metric
from nngeom.metrics.fisher import ExactFisher, MonteCarloFisher, as_likelihood
from nngeom.optim.curvature import Averaged, Curvature, Eigenbasis, Schedule, Seen
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.pmat.diag import PMatDiag
from nngeom.pmat.ekfac import PMatEKFAC
from nngeom.pmat.eye import PMatEye
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.mixed import Mixture, as_representation
from nngeom.pmat.pmat import Representation
from nngeom.pmat.recipe import Scope
from nngeom.space.collection import LayerCollection

REST = -2  # index of the representation of parameters that the chosen one cannot hold


class SkippedStepWarning(UserWarning):
    """A step was not taken because gradients or statistics were not finite; parameters and state are as before."""


class NaturalGradient(torch.optim.Optimizer):
    """``w <- w - lr (F + damping)^-1 grad`` with the Fisher matrix ``F`` in any representation, estimated while training.

    Wrap the forward and backward passes of a step in :meth:`observe`, then call :meth:`step`. ``F`` is the running
    average (weight of the past ``statistics_decay``, bias-corrected; 0: this batch alone) of the second moments of

    * ``fisher="empirical"``: gradients of the examples' own losses, read from the user's own backward pass;
    * ``"monte_carlo"``: scores of labels drawn from the model by ``likelihood``, one more backward pass;
    * ``"exact"``: the closed-form expectation over labels, one more backward pass of as many columns as outputs.

    Inverses and eigenbases are computed anew every ``every`` steps, averages take in every ``statistics_every``-th batch
    (with ``statistics_decay=0`` only those of a refresh). ``damping`` is a number (Tikhonov, exact), a damping object, or
    :class:`LevenbergMarquardt`; default ``FactoredTikhonov(1e-3)``. ``kl_clip`` bounds ``lr**2 / 2 v^T (F + damping) v``, the
    divergence the quadratic model predicts for a step ``-lr v``. ``momentum`` averages preconditioned gradients as
    ``torch.optim.SGD`` does gradients; ``weight_decay`` is decoupled, ``w <- w - lr weight_decay w``. All numbers may be
    callables of the step. ``params``: parameter groups as for any optimizer, each with its own ``lr``, ``momentum``,
    ``weight_decay``; default: one group of the collection.

    ``rest`` (``"diag"``, ``"eye"`` or a representation) takes the parameters the representation cannot hold: those above
    its ``block_limit``, and those used in ways no adapter knows (recurrent cells, batch normalisation in training mode),
    whose second moments are ``n`` times the squared gradient of the batch. ``outputs`` picks the outputs ``(n, ...)`` in
    what the model returns. ``scalings``, ``scalings_decay`` and ``async_basis`` concern EKFAC (:class:`EKFAC`).

    A step whose gradients or statistics are not finite is skipped with a :class:`SkippedStepWarning` that counts.
    Raises :class:`ArgumentError` on numbers out of range and on a step before anything was observed. Source: Amari 1998;
    Martens & Grosse 2015; George et al. 2018.
    """

    _step_supports_amp_scaling = True  # GradScaler hands its scale over instead of dividing the gradients itself

    def __init__(
        self,
        model: nn.Module,
        representation: Any = PMatKFAC,
        lr: Any = 0.1,
        momentum: Any = 0.9,
        damping: Any = None,
        weight_decay: Any = 0.0,
        statistics_decay: Any = 0.95,
        kl_clip: Any = None,
        fisher: str = "empirical",
        likelihood: Any = None,
        layer_collection: LayerCollection | None = None,
        *,
        params: Iterable[Any] | None = None,
        reduction: str = "mean",
        every: Any = 1,
        statistics_every: Any = 1,
        scalings: str = "batch",
        scalings_decay: Any = 0.75,
        rest: Any = "diag",
        outputs: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        async_basis: bool = False,
    ):
        if scalings not in ("batch", "running"):
            raise ArgumentError(f"scalings is {scalings!r}; expected 'batch' (of the examples of the batch) or 'running' (EKFAC-ra)")
        self.representation = as_representation(representation)
        self.collection = layer_collection if layer_collection is not None else LayerCollection.from_model(model)
        self.damping = FactoredTikhonov(1e-3) if damping is None else damping
        self.numbers = {
            "statistics_decay": statistics_decay, "scalings_decay": scalings_decay, "kl_clip": kl_clip, "every": every, "statistics_every": statistics_every,
        }  # fmt: skip
        self.reduction, self.scalings, self.rest = _reduction(reduction), scalings, _rest(rest)
        self.steps, self.skipped, self._refreshed = 0, 0, -1
        self.observer = Observer(model, self.collection, _metric(fisher, likelihood, seed), outputs, self.representation.part_of)
        self._worker = ThreadPoolExecutor(1, "eigenbases") if async_basis else None
        self._parts: dict[int, Curvature] = {}
        self._place: dict[str, int] = {}
        self._examples, self._observed, self._loss_scale = 0, False, 1.0
        parameters = self.observer.task.parameters
        self._mine = {id(p): name for name, p in parameters.items()}
        super().__init__(list(parameters.values()) if params is None else params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        grouped = {id(p) for group in self.param_groups for p in group["params"]}
        left = [name for name, p in parameters.items() if id(p) not in grouped]
        if left:
            raise ArgumentError(f"parameters {left[:4]} are in no group of params; put them in one, or leave them out with layer_collection")
        self._schedule()  # checks the numbers
        for group in self.param_groups:
            for key in ("lr", "momentum", "weight_decay"):
                _number(key, group[key], self.steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer; raises :class:`ArgumentError` for a parameter outside the collection."""
        super().add_param_group(param_group)
        odd = [tuple(p.shape) for p in self.param_groups[-1]["params"] if id(p) not in self._mine]
        if odd:
            self.param_groups.pop()
            raise ArgumentError(f"params holds parameters of shapes {odd[:4]} that are not trainable parameters of the model's collection; give those to another optimizer")

    # -- observing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def observe(self, reduction: str | None = None, scaler: Any = None) -> Iterator[Observation]:
        """Watch one or several forward and backward passes of the model; blocks add up until the step or ``zero_grad``.

        ``reduction`` says how the losses are reduced over examples: ``"mean"`` (all that is backpropagated before the step
        sums to the mean over all its examples: divide by the number of passes when accumulating), or ``"sum"``; default
        that of the constructor. A ``GradScaler`` is taken into account by itself, but for ``scaler.unscale_(opt)``
        before the step: then pass it as ``scaler``.
        """
        schedule = self._schedule()
        self.reduction = self.reduction if reduction is None else _reduction(reduction)
        with self.observer.watch(self._record(schedule)) as seen:
            yield seen
        if scaler is not None:
            self._loss_scale = scaler.get_scale()
        with torch.no_grad():
            for chunk in seen.chunks:
                self._assign(chunk)
                for part in self._parts.values():
                    part.observe(chunk, schedule)
        seen.chunks.clear()
        self._examples += seen.examples

    def _schedule(self) -> Schedule:
        number = {name: _number(name, x, self.steps) for name, x in self.numbers.items()}
        refresh = self._refreshed < 0 or self.steps - self._refreshed >= number["every"]
        statistics = refresh or (number["statistics_decay"] > 0 and self.steps % int(number["statistics_every"]) == 0)
        return Schedule(statistics, refresh, number["statistics_decay"], number["scalings_decay"], self._damping())

    def _damping(self) -> Damping:
        if isinstance(self.damping, LevenbergMarquardt):
            return self.damping.damping()
        return as_damping(self.damping(self.steps) if callable(self.damping) else self.damping)

    def _record(self, schedule: Schedule) -> bool:
        return schedule.statistics or any(isinstance(part, Eigenbasis) and not part.from_gradient for part in self._parts.values())

    def _assign(self, chunk: Chunk) -> None:
        """Which part each parameter belongs to; parts whose parameters change start anew."""
        place = {name: self._index(name) for name in self.collection.names}
        for layout, j in chunk.jacobians.items():
            representation = self._representation(place[layout.names[0]])
            limit = representation.settings.get("block_limit", _default_limit(representation))
            if not self.observer.batchwise.isdisjoint(layout.names) or (limit is not None and not j.kronecker and j.shape[-1] > limit):
                place.update(dict.fromkeys(layout.names, REST))
        place |= {name: REST for name, index in self._place.items() if index == REST}
        if place != self._place:
            self._build(place)

    def _build(self, place: dict[str, int]) -> None:
        members: dict[int, list[str]] = {}
        for name in self.collection.names:
            members.setdefault(place[name], []).append(name)
        parts = {}
        for index, names in members.items():
            old = self._parts.get(index)
            parts[index] = old if old is not None and list(old.scope.names) == names else self._part(index, Scope(self.collection, tuple(names)))
        self._parts, self._place = parts, place

    def _part(self, index: int, scope: Scope) -> Curvature:
        representation = self._representation(index)
        if representation.kind is PMatEKFAC:
            return Eigenbasis(representation, scope, self.scalings, self.observer.metric is not None, self._worker)
        return Averaged(representation, scope, eager=index == REST)

    def _index(self, name: str) -> int:
        return self.representation._index(name) if isinstance(self.representation, Mixture) else 0

    def _representation(self, index: int) -> Representation:
        if index == REST:
            return self.rest
        return self.representation._representation(index) if isinstance(self.representation, Mixture) else self.representation

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also drops what was observed since the last step."""
        self._forget()
        super().zero_grad(set_to_none)

    def _forget(self) -> None:
        for part in self._parts.values():
            part.forget()
        self._examples, self._loss_scale = 0, 1.0

    # -- stepping ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, evaluate: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Precondition ``.grad`` and move. ``closure`` makes the passes itself, inside :meth:`observe`, and returns the loss.

        ``evaluate`` returns the loss of the batch at the current parameters, for :class:`LevenbergMarquardt`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._unscale():
            self._forget()
            return loss
        compare = isinstance(self.damping, LevenbergMarquardt) and self.damping.due(self.steps)
        if compare and evaluate is None:
            raise ArgumentError("damping is LevenbergMarquardt: pass the loss of the batch as a function, step(evaluate=lambda: criterion(model(x), y))")
        following = isinstance(self.damping, LevenbergMarquardt)
        gradient = self._gradient() if following else None
        before = float(evaluate()) if compare else 0.0  # type: ignore[misc]
        clip = self._precondition()
        if clip is None:
            return loss
        predicted = self._move(None if gradient is None else gradient, clip)
        if compare:
            self.damping.update(float(evaluate()) - before, predicted)  # type: ignore[misc]
        return loss

    def precondition_(self) -> bool:
        """Rewrite ``.grad`` into ``(F + damping)^-1 grad``, so that any optimizer can take the step; ``False`` if it was skipped."""
        with torch.no_grad():
            return self._precondition() is not None

    def _unscale(self) -> bool:
        """What ``GradScaler.step`` left to us; ``False`` when it found gradients that are not finite."""
        if not hasattr(self, "found_inf"):
            return True
        scale = getattr(self, "grad_scale", None)
        if bool(self.found_inf):
            return False
        if scale is not None:
            self._loss_scale = float(scale)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(1 / self._loss_scale)
        elif self._loss_scale == 1.0 and self._examples and self.observer.metric is None:
            raise ArgumentError("the gradients were unscaled before the step, scaler.unscale_(opt), and the observed ones were not: pass observe(scaler=scaler)")
        return True

    def _gradient(self) -> Tensor:
        """``[d]``, zeros where there is none."""
        task = self.observer.task
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in task.parameters.values()]
        return torch.cat([g.reshape(-1).to(accumulation_dtype(task.dtype)) for g in grads])

    def _precondition(self) -> float | None:
        """The factor of clipping; ``None`` when the step is skipped."""
        schedule, flat = self._schedule(), self._gradient()
        if not bool(torch.isfinite(flat.sum())) or not all(part.finite() for part in self._parts.values()):
            return self._skip("gradients or statistics are not finite")
        mean = self.reduction == "mean"
        own = self.observer.metric is None
        scale = (self._examples if mean else 1) / self._loss_scale if own else 1.0
        seen = Seen(self._examples, scale, flat, 1.0 if mean or not self._examples else 1 / self._examples)
        out = flat.clone()
        try:
            for part in self._parts.values():
                part.update(seen, schedule)
                part.precondition(flat, out, schedule.damping)
        except (SingularError, NonFiniteError) as error:
            if self.steps == 0:
                raise
            return self._skip(str(error))
        if not any(part.blocks for part in self._parts.values()):
            raise ArgumentError("step() before anything was observed; expected the forward and backward pass inside `with opt.observe():`")
        if not bool(torch.isfinite(out.sum())):
            return self._skip("the preconditioned gradient is not finite")
        clip = self._clip(flat, out)
        self._write(out * clip if clip != 1.0 else out)
        if schedule.refresh:
            self._refreshed = self.steps
        self.steps += 1
        self._examples, self._loss_scale = 0, 1.0
        return clip

    def _skip(self, why: str) -> None:
        self.skipped += 1
        self._forget()
        warnings.warn(f"a step was skipped ({self.skipped} so far): {why}", SkippedStepWarning, stacklevel=4)

    def _clip(self, flat: Tensor, out: Tensor) -> float:
        bound = _number("kl_clip", self.numbers["kl_clip"], self.steps)
        if bound is None:
            return 1.0
        rate = {id(p): _number("lr", group["lr"], self.steps) for group in self.param_groups for p in group["params"]}
        sizes = [p.numel() for p in self.observer.task.parameters.values()]
        inner = torch.stack([x.sum() for x in (flat * out).split(sizes)]).tolist()
        divergence = sum(0.5 * rate[id(p)] ** 2 * x for p, x in zip(self.observer.task.parameters.values(), inner))
        return min(1.0, math.sqrt(bound / divergence)) if divergence > 0 else 1.0

    def _write(self, flat: Tensor) -> None:
        lo = 0
        for p in self.observer.task.parameters.values():
            if p.grad is not None:
                p.grad.copy_(flat[lo : lo + p.numel()].view(p.shape))
            lo += p.numel()

    def _move(self, gradient: Tensor | None, clip: float) -> float:
        """Momentum, weight decay and the step. Returns the change of the loss that the quadratic model predicts, given the gradient."""
        step, predicted, lo = self.steps - 1, 0.0, 0
        places = {}
        for p in self.observer.task.parameters.values():
            places[id(p)], lo = (lo, lo + p.numel()), lo + p.numel()
        for group in self.param_groups:
            lr, momentum, decay = (_number(key, group[key], step) for key in ("lr", "momentum", "weight_decay"))
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            directions = [p.grad for p in moved]
            curved: list[Tensor] = []  # (F + damping) times the directions
            if gradient is not None:
                curved = [clip * gradient[slice(*places[id(p)])].view(p.shape) for p in moved]
            if momentum:
                directions = self._average("momentum_buffer", moved, directions, momentum)
                curved = self._average("curved_buffer", moved, curved, momentum) if curved else []
            for p, v, fv in zip(moved, directions, curved):
                g = gradient[slice(*places[id(p)])].view(p.shape)  # type: ignore[index]
                predicted += float(0.5 * lr * lr * (v * fv).sum() - lr * (g * v).sum())
            if decay:
                torch._foreach_mul_(moved, 1 - lr * decay)
            torch._foreach_add_(moved, directions, alpha=-lr)
        return predicted

    def _average(self, key: str, moved: list[Tensor], x: list[Tensor], momentum: float) -> list[Tensor]:
        fresh = [p for p in moved if key not in self.state[p]]
        for p in fresh:
            self.state[p][key] = torch.zeros_like(p)
        buffers = [self.state[p][key] for p in moved]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, x)
        return buffers

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the coming steps, as tensors, numbers, strings, lists and dicts; callables are not part of it.

        What was observed since the last step is not saved.
        """
        state = super().state_dict()
        state["param_groups"] = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
        state["curvature"] = {
            "steps": self.steps, "skipped": self.skipped, "refreshed": self._refreshed, "drawn": self.observer.drawn, "reduction": self.reduction,
            "damping": self.damping.value if isinstance(self.damping, LevenbergMarquardt) else None,
            "batchwise": sorted(self.observer.batchwise),
            "parts": {index: part.state() for index, part in self._parts.items()},
        }  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: the steps that follow are the same, bit by bit. Callables stay those of this optimizer."""
        if "curvature" not in state_dict:
            raise ArgumentError("the state holds no curvature; expected the state_dict() of the same kind of optimizer")
        groups = [{**{k: v for k, v in mine.items() if callable(v)}, **group} for mine, group in zip(self.param_groups, state_dict["param_groups"])]
        super().load_state_dict({**{k: v for k, v in state_dict.items() if k != "curvature"}, "param_groups": groups})
        saved = state_dict["curvature"]
        self.steps, self.skipped, self._refreshed = saved["steps"], saved["skipped"], saved["refreshed"]
        self.reduction, self.observer.drawn = saved["reduction"], saved["drawn"]
        self.observer.batchwise.update(saved["batchwise"])
        if saved["damping"] is not None and isinstance(self.damping, LevenbergMarquardt):
            self.damping.value = saved["damping"]
        place = {name: index for index, part in saved["parts"].items() for name in part["names"]}
        self._parts, self._place = {}, {}
        if place:
            if set(place) != set(self.collection.names):
                odd = sorted(set(place) ^ set(self.collection.names))
                raise ArgumentError(f"the state belongs to other parameters; they differ in {odd[:4]}")
            self._build(place)
            for index, part in saved["parts"].items():
                self._parts[index].load(part)


def _number(name: str, x: Any, step: int) -> Any:
    """A number, or a callable of the step; raises :class:`ArgumentError` out of range."""
    value = x(step) if callable(x) else x
    if name == "kl_clip" and value is None:
        return None
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentTypeError(f"{name} is {value!r}; expected a finite number, or a callable of the step")
    low, high, strict = {"lr": (0, math.inf, False), "weight_decay": (0, math.inf, False), "kl_clip": (0, math.inf, True)}.get(name, (0, 1, False))
    if name in ("every", "statistics_every"):
        low, high = 1, math.inf
    if value < low or (strict and value <= low) or (high == 1 and value >= 1):
        raise ArgumentError(f"{name} is {value}; expected a number {'in [0, 1)' if high == 1 else f'above {low}' if strict else f'of at least {low}'}")
    return value


def _reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f"reduction is {reduction!r}; expected 'mean' or 'sum', how the loss is reduced over examples")
    return reduction


def _rest(rest: Any) -> Representation:
    named = {"diag": PMatDiag, "eye": PMatEye}
    if isinstance(rest, str) and rest not in named:
        raise ArgumentError(f"rest is {rest!r}; expected {sorted(named)} or a representation")
    return as_representation(named.get(rest, rest) if isinstance(rest, str) else rest)


def _metric(fisher: str, likelihood: Any, seed: int) -> Metric | None:
    if fisher not in ("empirical", "monte_carlo", "exact"):
        raise ArgumentError(f"fisher is {fisher!r}; expected 'empirical', 'monte_carlo' or 'exact'")
    if fisher == "empirical":
        if likelihood is not None:
            raise ArgumentError("likelihood is for fisher='monte_carlo' or 'exact'; the empirical one comes from your own loss")
        return None
    if likelihood is None:
        raise ArgumentError(f"fisher={fisher!r} needs a likelihood, such as 'categorical' or 'gaussian'")
    return ExactFisher(as_likelihood(likelihood)) if fisher == "exact" else MonteCarloFisher(as_likelihood(likelihood), 1, seed)


def _default_limit(representation: Representation) -> int | None:
    parameter = signature(representation.kind.recipe).parameters.get("block_limit")
    return None if parameter is None else parameter.default

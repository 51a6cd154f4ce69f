"""Natural-gradient descent with any representation of the Fisher matrix as preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.gathered import sharded_modules
from nngeom.core.damping import FactoredTikhonov
from nngeom.core.errors import ArgumentError
from nngeom.optim.arguments import as_metric, as_reduction, as_rest
from nngeom.optim.automatic import Automatic
from nngeom.optim.averaged import keeper
from nngeom.optim.bound import Bound
from nngeom.optim.fallback import Fallback, outside
from nngeom.optim.gradients import Gradients
from nngeom.optim.groups import as_groups, require_groups
from nngeom.optim.intake import Intake
from nngeom.optim.joint import Joint, require_synchronous
from nngeom.optim.labelled import labelled_when_asked
from nngeom.optim.levenberg_marquardt import LevenbergMarquardt
from nngeom.optim.manner import as_manner
from nngeom.optim.model_check import ModelCheck
from nngeom.optim.owners import Owners
from nngeom.optim.partition import Partition
from nngeom.optim.pending import Pending
from nngeom.optim.preconditioned import Preconditioned
from nngeom.optim.replicas import require_model
from nngeom.optim.schedule import Clock
from nngeom.optim.sharded import require_trainable
from nngeom.optim.spectra import require_spectrum
from nngeom.optim.unscaling import unscale
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.representation import as_representation
from nngeom.ranks.team import Team
from nngeom.space.collection import LayerCollection
from nngeom.sweep.observe import Observer


class NaturalGradient(Preconditioned):
    """``w <- w - lr (F + damping)^-1 grad`` with the Fisher matrix ``F`` in any representation, estimated while
    training.

    Wrap the forward and backward passes of a step in :meth:`observe`, then call :meth:`step`. ``F`` is a running
    average of second moments. All numbers may be callables of the step.

    Args:
        representation: what holds ``F``, as for :func:`nngeom.FIM`.
        lr: the learning rate, at least 0.
        momentum: in [0, 1), averages preconditioned gradients as ``torch.optim.SGD`` does gradients.
        damping: a number (Tikhonov, exact), a damping object, :class:`LevenbergMarquardt` or :class:`VarianceDamping`;
            default ``FactoredTikhonov(1e-3, balanced=False)``.
        weight_decay: decoupled, ``w <- w - lr weight_decay w``.
        statistics_decay: in [0, 1), the weight of the past in ``F``, bias-corrected; 0: this batch alone.
        kl_clip: bounds ``lr**2 / 2 v^T (F + damping)^power v``, for ``power=1`` the divergence that the quadratic model
            predicts for a step ``-lr v``; ``None``: no bound.
        fisher: second moments of what: ``"empirical"``, gradients of the examples' own losses, read from the user's own
            backward pass; ``"monte_carlo"``, scores of labels drawn from the model by ``likelihood``, one more backward
            pass; ``"exact"``, the closed-form expectation over labels, one more backward pass of as many columns as
            outputs.
        likelihood: of the last two, as for :func:`nngeom.FIM`.
        params: parameter groups as for any optimizer, each with its own ``lr``, ``momentum``, ``weight_decay``;
            default: one group of the collection.
        reduction: how losses are reduced over examples, ``"mean"`` (the default), ``"sum"`` or ``"token_mean"``: see
            :meth:`observe`.
        fallback: settings of ``torch.optim.AdamW`` as a dict (``True``: its defaults), which steps the parameters
            outside of ``layer_collection``; groups of ``params`` with ``"fallback": True`` have their own.
        automatic: whether every pass of the model in training mode is observed without :meth:`observe`.
        every: steps after which inverses and eigenbases are computed anew.
        statistics_every: averages take in every so-many-th batch (with ``statistics_decay=0`` only those of a refresh).
        scalings: of EKFAC alone: see :class:`EKFAC`.
        scalings_decay: of EKFAC alone: see :class:`EKFAC`.
        factors: of EKFAC alone: see :class:`EKFAC`.
        refresh: of EKFAC alone: see :class:`EKFAC`.
        power: of EKFAC alone: see :class:`EKFAC`.
        drowned: of EKFAC and KFAC alone: see there.
        first_decay: of EKFAC alone: the weight of the past in Adam's first moment, for ``scalings="adam"``.
        rest: ``"diag"``, ``"eye"`` or a representation, which takes the parameters that ``representation`` cannot hold:
            those above its ``block_limit``, and those used in ways no adapter knows (weight norm, batch
            normalisation in training mode), whose second moments are ``n`` times the squared gradient of the batch.
        outputs: picks the outputs ``(n, ...)`` in what the model returns.
        seed: of the labels that are drawn.
        async_basis: of EKFAC alone: see :class:`EKFAC`.
        process_group: the processes that a ``DistributedDataParallel`` model is replicated over, or one under
            ``fully_shard`` sharded: the curvature is that of their joint batch, and all take the same step, bit by bit.
        placement: of the curvature over these: ``"replicated"``, every one keeps that of all layers; ``"owned"``, each
            keeps that of some, is sent the others' sums of them and sends their preconditioned gradients;
            ``"auto"``, owned where averages and inverses or bases exceed an eighth of the memory of a device.

    A step whose gradients or statistics are not finite is skipped with a :class:`SkippedStepWarning` that counts.
    Raises :class:`ArgumentError` on numbers out of range and on a step before anything was observed,
    :class:`UnsupportedError` for a model replicated over several processes without ``process_group``,
    :class:`RankMismatchError` where they differ. Source: Amari 1998; Martens & Grosse 2015;
    George et al. 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        representation: Any = PMatKFAC,
        lr: Any = 0.01,
        momentum: Any = 0.9,
        damping: Any = None,
        weight_decay: Any = 0.0,
        statistics_decay: Any = 0.95,
        kl_clip: Any = 1e-4,
        fisher: str = "empirical",
        likelihood: Any = None,
        layer_collection: LayerCollection | None = None,
        *,
        params: Iterable[Any] | None = None,
        reduction: str | None = None,
        automatic: bool = False,
        fallback: Mapping[str, Any] | bool | None = None,
        every: Any = 1,
        statistics_every: Any = 1,
        scalings: str = "batch",
        scalings_decay: Any = 0.75,
        factors: str = "rows",
        refresh: str = "eigh",
        power: float = 1.0,
        first_decay: float = 0.95,
        drowned: float = 0.0,
        rest: Any = "diag",
        outputs: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        async_basis: bool = False,
        process_group: Any = None,
        placement: str = "replicated",
    ):
        team = Team.of(process_group)
        require_model(model, team)
        require_synchronous(team, async_basis=async_basis)
        self.collection = layer_collection if layer_collection is not None else LayerCollection.from_model(model)
        self.representation = as_representation(representation).within(self.collection)
        self.clock = Clock(
            FactoredTikhonov(1e-3, balanced=False) if damping is None else damping,
            variances=keeper(self.representation).tells_variances and scalings == "batch" and fisher == "empirical",
            kl_clip=kl_clip,
            statistics_decay=statistics_decay,
            scalings_decay=scalings_decay,
            every=every,
            statistics_every=statistics_every,
        )
        self.pending = Pending("mean" if reduction is None else as_reduction(reduction), reduction is not None)
        require_trainable(model, self.collection, team, automatic=automatic, fallback=fallback, damping=damping)
        self.sharded = bool(sharded_modules(model))
        self.observer = Observer(
            model,
            self.collection,
            as_metric(fisher, likelihood, seed),
            outputs,
            self.representation.division,
            team,
            parts=True,
        )
        worker = ThreadPoolExecutor(1, "eigenbases") if async_basis else None
        manner = as_manner(
            scalings=scalings,
            own_rows=self.observer.cotangents is not None,
            team=team,
            worker=worker,
            factors=factors,
            refresh=refresh,
            power=power,
            first_decay=first_decay,
            drowned=drowned,
        )
        require_spectrum(manner.scalings)
        owners = Owners(self.collection, team, placement)
        self.partition = Partition(self.collection, self.representation, as_rest(rest), self.observer, manner, owners)
        parameters = self.observer.network.parameters
        self.gradients = Gradients(parameters.values(), self.observer.network.dtype)
        self.intake = Intake(self.clock, self.partition, self.pending, own_loss=self.observer.cotangents is None)
        self.automatic = Automatic(self.observer, self.intake, self.gradients.parameters, on=automatic)
        self.fallback = Fallback(fallback, outside(model, parameters))
        groups = self.fallback.completed(as_groups(self.gradients.parameters if params is None else params))
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        require_groups(self.param_groups, parameters)
        self.bound, self.check = Bound(), ModelCheck()
        self.clock.now()  # checks the damping
        self.joint = Joint(team, self.observer, self.partition, self.pending)
        self.joint.agree(
            type(self).__name__,
            representation=self.representation,
            scalings=scalings,
            metric=self.observer.cotangents,
            placement=placement,
        )

    @labelled_when_asked
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        evaluate: Callable[[], Any] | None = None,
        outputs: Callable[[], Any] | None = None,
    ) -> Any:
        """Precondition ``.grad`` and move. ``closure`` makes the passes itself, inside :meth:`observe`, and returns the
        loss.

        ``evaluate`` returns the loss of the batch at the current parameters, for :class:`LevenbergMarquardt`.
        ``outputs`` returns what the model does for the batch, or a part of it: then the step is the combination of the
        preconditioned gradient and the last step that is lowest in the quadratic model of the loss, with the exact
        Fisher matrix of these outputs, and ``lr`` and ``momentum`` are not used (Martens & Grosse 2015, sections 6.4
        and 7); ``kl_clip`` bounds its divergence in this model. It takes two products with the Jacobian,
        ``fisher="monte_carlo"`` or ``"exact"``, a loss averaged over examples, a number or :class:`FactoredTikhonov`
        as damping, and no ``weight_decay``.
        """
        loss = None if closure is None else self.automatic.run(closure)
        self.automatic.collect()
        if (closure is not None or self.automatic.on) and self.automatic.is_idle():
            return loss
        self.pending.loss = loss.detach() if isinstance(loss, Tensor) else None
        if not unscale(self):
            self._skip("scaler", "GradScaler found gradients that are not finite, and lowers its scale")
            return loss
        rule = self.damping if isinstance(self.damping, LevenbergMarquardt) else None
        compare = rule is not None and rule.due(self.clock.steps)
        if compare and evaluate is None:
            raise ArgumentError(
                "damping is LevenbergMarquardt: pass the loss of the batch as a function, step(evaluate=lambda: "
                "criterion(model(x), y))"
            )
        model = None if outputs is None else self._quadratic(outputs)
        broken = self.fallback.broken(self.param_groups)
        if broken is not None:
            self._skip("gradient", broken)
            return loss
        gradient = None if rule is None and model is None else self.gradients.read().clone()
        before = self.joint.mean(float(evaluate())) if compare and evaluate is not None else 0.0
        clip = self._precondition()
        if clip is None:
            return loss
        if model is None or gradient is None:
            predicted: float | None = self._move(gradient, clip)
        else:
            predicted = self._move_lowest(model, gradient)
        if predicted is None:
            return loss
        self.fallback.step(self.param_groups, self.state, self.clock.steps - 1)
        if rule is not None and compare and evaluate is not None:
            self.check.compared(rule.update(self.joint.mean(float(evaluate())) - before, predicted))
        return loss

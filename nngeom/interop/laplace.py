"""Curvature for ``laplace-torch``: its Laplace approximations on every model that this library measures.

``Laplace(model, "classification", hessian_structure="kron", backend=NNGeomGGN)``. Needs ``laplace-torch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, MissingExtraError

try:
    from nngeom.interop.laplace_torch import CurvatureInterface, CurvlinopsGGN, EFInterface, GGNInterface
except ImportError as e:
    raise MissingExtraError(
        f"laplace-torch is not installed ({e}); pip install --no-deps laplace-torch (it asks for torchvision, which "
        "brings another torch), and what it needs one by one"
    ) from e

from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.likelihood import Gaussian
from nngeom.cotangents.loss import EmpiricalFisher, as_loss
from nngeom.fmat.side import Side
from nngeom.interop.kronecker_lists import Factorization, factorization, require_room, unpaired
from nngeom.maps.implicit import dense_rows
from nngeom.measures.jacobian import Jacobian
from nngeom.measures.second_moments import FIM, EmpiricalFIM, FIM_MonteCarlo
from nngeom.pmat.dense import PMatBlockDiag, PMatDense
from nngeom.pmat.diag import PMatDiag
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.mixed import PMatMixed
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy


class NNGeomInterface(CurvatureInterface):
    """What the backends share: one batch in, sums over its examples out, as laplace adds them up.

    By position and by name those of laplace's own backends: ``model``, ``likelihood``, ``last_layer``,
    ``subnetwork_indices``, ``dict_key_x``, ``dict_key_y``; and by name:

    Args:
        sharing: positions of a shared weight as independent (``"expand"``) or averaged first (``"reduce"``).
        block_limit: a weight that is no Kronecker product keeps its exact block up to so many entries.
        memory_budget: bytes for temporaries.
        check: whether every batch is checked, as everywhere.
        options: those of laplace's.
    """

    def __init__(
        self,
        *args: Any,
        sharing: str = "expand",
        block_limit: int = 4096,
        memory_budget: int | None = None,
        check: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.sharing, self.block_limit = sharing, block_limit
        self.settings: dict[str, Any] = {"memory_budget": memory_budget, "check": check}
        self._collection = LayerCollection.from_model(self._model)
        shapes = dict(zip(self._collection.names, self._collection.shapes))
        layers = self._collection.by_layer().values()
        self.exact = tuple(name for names in layers if all(len(shapes[n]) < 2 for n in names) for name in names)

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The Jacobian ``(n, *shape, d)`` and the outputs ``(n, *shape)`` at the inputs ``x``; with ``enable_backprop``
        those of laplace, which keep a graph.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        f, rows = self._outputs(x), self._jacobian(lambda x: self.model(x), [x])
        return self._selected(rows.reshape(*f.shape, rows.shape[-1])), f

    def selected_output_jacobians(
        self,
        x: Any,
        outputs: Tensor,
        enable_backprop: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The rows ``(n, k, d)`` of the Jacobian at ``x`` of the ``outputs (n, k)`` or ``(n,)`` alone, and all outputs;
        ``enable_backprop`` as in :meth:`jacobians`.
        """
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)
        chosen = outputs if outputs.ndim == 2 else outputs.unsqueeze(1)
        f = self._outputs(x)
        if len(chosen) != len(f):
            raise ArgumentError(f"outputs are chosen for {len(chosen)} examples, and the inputs are {len(f)}")
        pick = lambda x, k: self.model(x).gather(1, k)
        return self._selected(self._jacobian(pick, (x, chosen.to(f.device, torch.long)))), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient ``(n, d)`` of laplace's loss (no half in the squared error) at inputs ``x`` and targets ``y``,
        example by example, and its sum.
        """
        network, seen, f = self._seen(x)
        run = Run.of(network, (seen, y), function=lambda x, _: network(x), progress=False, **self.settings)
        with run.within():
            rows = dense_rows(Side.of(run, EmpiricalFisher(as_loss(self._loss, network)), Policy("gradients")))[0]
        return self._selected(rows) / self.factor, self.lossfunc(*self._flat(f, y)).detach()

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the matrix ``(d, d)``, summed over the examples ``x``, ``y``.

        ``kwargs``: ``mc_samples`` in place of ``num_samples``, and laplace's ``N``, which sums do not need. Raises
        :class:`ArgumentError` for others, and for ``mc_samples`` of a subnetwork.
        """
        samples = _samples("full", kwargs)
        if self.subnetwork_indices is not None:
            if samples is not None:
                raise ArgumentError("a subnetwork takes no mc_samples; set num_samples in backend_kwargs")
            return super().full(x, y)  # of the selected columns of the Jacobian
        f, matrix = self._measured(x, y, PMatDense, samples)
        return self._batch_loss(f, y), self._sum_of(f) * matrix.to_dense()

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal ``(d,)``, summed over the examples ``x``, ``y``; ``kwargs`` as in :meth:`full`."""
        f, matrix = self._measured(x, y, PMatDiag, _samples("diag", kwargs))
        return self._batch_loss(f, y), self._selected(self._sum_of(f) * matrix.diag().flat())

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Factorization]:
        """The loss and the Kronecker factors of the examples ``x``, ``y`` of ``N``, a pair a weight and a block a bias,
        as laplace holds them.

        Norms and other layers of vectors alone, and weights that are no product of such a pair (groups, transposed
        kernels), keep exact blocks. ``kwargs``: ``kfac_approx`` in place of ``sharing``,
        ``mc_samples`` in place of ``num_samples``. Raises :class:`ArgumentError` for others, and for a subnetwork.
        """
        if self.subnetwork_indices is not None:
            raise ArgumentError("a subnetwork has no Kronecker factors; expected hessian_structure 'full' or 'diag'")
        sharing = kwargs.pop("kfac_approx", self.sharing)
        samples = _samples("kron", kwargs, "kfac_approx or mc_samples")
        f, matrix = self._measured(x, y, self._kronecker(sharing), samples)
        if found := unpaired(matrix):
            require_room(self._collection, found, self.block_limit)
            self.exact = (*self.exact, *found)
            f, matrix = self._measured(x, y, self._kronecker(sharing), samples)
        scaled = matrix * (self._sum_of(f) / len(f))
        return self._batch_loss(f, y), factorization(scaled, len(f), N)

    def _kronecker(self, sharing: str) -> Any:
        """Kronecker factors where laplace can hold them, exact blocks elsewhere."""
        kronecker = PMatKFAC.options(sharing=sharing, block_limit=self.block_limit)
        return PMatMixed({self.exact: PMatBlockDiag}, default=kronecker) if self.exact else kronecker

    def _measured(self, x: Any, y: Tensor, representation: Any, samples: int | None = None) -> tuple[Tensor, PMat]:
        """The outputs, and the mean over the examples of what this backend measures."""
        network, seen, f = self._seen(x)
        return f, self._measure(network, (seen, y), representation, samples)

    def _measure(self, network: nn.Module, batch: Any, representation: Any, samples: int | None) -> PMat:
        raise NotImplementedError

    def _sum_of(self, f: Tensor) -> float:
        """What makes of a mean the sum that laplace wants."""
        return len(f)

    def _seen(self, x: Any) -> tuple[nn.Module, Any, Tensor]:
        """The network that is measured, its inputs, and the outputs of the whole."""
        if not self.last_layer:
            return self.model, x, self._outputs(x)
        with torch.no_grad():
            extractor: Any = self.model
            f, features = extractor.forward_with_features(x)
        return self._model, features.detach(), f

    def _outputs(self, x: Any) -> Tensor:
        with torch.no_grad():
            return self.model(x).detach()

    def _jacobian(self, function: Callable[..., Tensor], batch: Any) -> Tensor:
        j = Jacobian(self.model, batch, function=function, **self.settings)
        return j.tensor.transpose(0, 1)

    def _selected(self, t: Tensor) -> Tensor:
        return t if self.subnetwork_indices is None else t[..., self.subnetwork_indices]

    def _flat(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets with the positions of an example among the examples."""
        return (f, y) if self.likelihood == "regression" else (f.flatten(0, -2), y.flatten())

    def _batch_loss(self, f: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.lossfunc(*self._flat(f, y)).detach()

    @property
    def _loss(self) -> Any:
        return "mse" if self.likelihood == "regression" else nn.CrossEntropyLoss(reduction="sum")


def _samples(method: str, kwargs: dict[str, Any], known: str = "mc_samples") -> int | None:
    """How many targets are drawn an example, where that is said; nothing else is taken but the size of the data."""
    if others := sorted(set(kwargs) - {"N", "mc_samples"}):
        raise ArgumentError(f"{method} has no options {others}; expected {known}")
    return kwargs.get("mc_samples")


class _Admitted(type):
    """``FunctionalLaplace`` asserts ``backend in [BackPackGGN, AsdlGGN, CurvlinopsGGN]`` (laplace-torch 0.3, line 2677
    of baselaplace.py), and asks it for Jacobians and a loss alone: a class of this kind passes as the last of these.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is CurvlinopsGGN

    __hash__ = type.__hash__


class NNGeomGGN(NNGeomInterface, GGNInterface, metaclass=_Admitted):
    """The Gauss-Newton matrix, which is the Fisher matrix of laplace's likelihoods: exact, or with ``stochastic=True``
    from ``num_samples`` drawn targets an example.

    ``sharing``, ``block_limit``, ``memory_budget``, ``check`` and ``options`` as for :class:`NNGeomInterface`.
    """

    def _measure(self, network: nn.Module, batch: Any, representation: Any, samples: int | None) -> PMat:
        likelihood = Gaussian() if self.likelihood == "regression" else Categorical(dim=-1)
        settings: dict[str, Any] = {**self.settings, "likelihood": likelihood, "function": lambda x, _: network(x)}
        if self.stochastic:
            return FIM_MonteCarlo(network, batch, representation, samples=samples or self.num_samples, **settings)
        return FIM(network, batch, representation, **settings)


class NNGeomEF(NNGeomInterface, EFInterface):
    """The empirical Fisher matrix: second moments of the gradients of the loss, scaled as laplace's (for a regression
    twice those of half the squared error).

    ``sharing``, ``block_limit``, ``memory_budget``, ``check`` and ``options`` as for :class:`NNGeomInterface`.
    """

    def _measure(self, network: nn.Module, batch: Any, representation: Any, samples: int | None) -> PMat:
        settings: dict[str, Any] = {**self.settings, "loss": self._loss, "function": lambda x, _: network(x)}
        return EmpiricalFIM(network, batch, representation, **settings)

    def _sum_of(self, f: Tensor) -> float:
        return len(f) / self.factor

"""Nothing stored but the data: matrices known by their products, and what is solved and estimated with these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.capture.network import Network
from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, CollectionError, ConvergenceError, UnsupportedError
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.linear import identity, solution, symmetric
from nngeom.pmat.estimated import EstimatedOperator
from nngeom.pmat.implicit_inverse import ImplicitInverse
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.ranks.totals import generator_of, mean
from nngeom.solve.iterative import iterative
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep


@dataclass(frozen=True, eq=False)
class PMatImplicit(EstimatedOperator):
    """A matrix known by its products, exact and without storage; it keeps the model and the batches, and is not
    picklable.

    ``sweep``: the model, the batches and what is measured of them; ``scale``: a factor.
    """

    sweep: Sweep
    scale: float | Tensor = 1.0

    @property
    def run(self) -> Run:
        """The model on its batches."""
        return self.sweep.run

    @property
    def network(self) -> Network:
        """The model and its function."""
        return self.run.network

    @property
    def layer_collection(self) -> LayerCollection:
        """The parameters this matrix acts on."""
        return self.network.collection

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.network.dtype)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """A vector ``x [d]`` as a tangent of every parameter."""
        v = PVector(self.layer_collection, x)
        return {name: v[name].to(p.dtype) for name, p in self.network.parameters.items()}

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What products depend on."""
        return tuple(self.network.parameters.values())

    def product(self, x: Tensor) -> Tensor:
        product = symmetric(self._unscaled, x, self.held)
        return product if isinstance(self.scale, float) and self.scale == 1 else self.scale * product

    def _unscaled(self, x: Tensor) -> Tensor:
        """Products ``[*b, d] -> [*b, d]`` before scaling; no graph is kept."""
        flat = x.reshape(-1, x.shape[-1])
        with self.run.within():
            return (self._of_all(flat) if len(flat) else flat).reshape(x.shape)

    def _of_all(self, x: Tensor) -> Tensor:
        return mean(self.run.team, f"product with {type(self).__name__}", lambda: self.products(x), [x])

    def products(self, x: Tensor) -> tuple[Tensor, int]:
        """Products of ``x [b, d]`` before scaling, summed over the examples of this process, and how many these are;
        under the budget in force.
        """
        raise UnsupportedError("an implicit operator defines its products")

    def _drawn(self, generator: torch.Generator | None) -> torch.Generator | None:
        return generator_of(self.run.team, generator, self.device)

    # -- layers --------------------------------------------------------------------------------------------------------

    def by_layer(self) -> dict[str, PMatImplicit]:
        """``{layer: the implicit matrix of that layer's parameters}``: the diagonal blocks, on the same batches."""
        return {layer: self.of_parameters(names) for layer, names in self.layer_collection.by_layer().items()}

    def __getitem__(self, pattern: Any) -> PMatImplicit:
        """The diagonal block of a layer, or of the parameters that another ``pattern`` means, as
        :meth:`LayerCollection.from_model` takes them; raises :class:`CollectionError` where nothing matches.
        """
        return self.of_parameters(self.layer_collection.part(pattern).names)

    def of_parameters(self, names: tuple[str, ...]) -> PMatImplicit:
        """The diagonal block of some parameters, ``names``."""
        if not names:
            raise CollectionError("no parameter is asked for; expected a pattern that some match")
        network = self.network.only(names)
        run = replace(self.run, network=network, left_to_fallback=set(self.run.left_to_fallback))
        return replace(self, sweep=replace(self.sweep, run=run))

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        return [(self.scale, self._unscaled)]

    # -- what it solves ------------------------------------------------------------------------------------------------

    def solve(
        self,
        b: Any,
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        preconditioner: PMat | None = None,
        *,
        x0: PVector | None = None,
        strict: bool = True,
        indefinite: bool = False,
    ) -> Any:
        """``(M + damping I)^-1 b`` by conjugate gradients to a residual of ``tol`` relative to ``b``.

        ``max_steps``: products at most (by default ten times the side, at most 10 000). ``x0``: a first guess, of the
        shape of ``b``. ``preconditioner``: a PMat whose ``solve`` with the same damping approximates this one.
        ``indefinite``: by MINRES, for a matrix with negative eigenvalues that is not singular; without preconditioner.

        Raises :class:`ConvergenceError` when ``tol`` is not reached, whose ``iterate`` and ``residual`` hold what was;
        ``strict=False`` returns that instead. Raises :class:`SingularError` at a direction of no or negative curvature
        unless ``indefinite``, and where the damped matrix is singular. Differentiable in ``b`` and ``damping``, as the
        exact solution is: another solve.
        """
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError(
                "an implicit matrix takes a number as damping: Cutoff and FactoredTikhonov need a factorisation"
            )
        apply = None
        if preconditioner is not None:
            inverse = preconditioner.inverse(d)
            apply = lambda r: inverse.product(r.to(inverse.dtype)).to(r.dtype)
        guess = None if x0 is None else self.operand(x0)
        solver = iterative(tol, max_steps, apply, guess, strict=strict, indefinite=indefinite)
        try:
            with self.run.within():  # once for all products
                return self._apply(lambda x: solution(solver, [*self.terms(), (d.value, identity)], x, self.held), b)
        except ConvergenceError as error:
            error.iterate = PVector(self.layer_collection, error.iterate)
            raise

    def inverse(
        self, damping: float | Tensor | Damping = 0.0, *, indefinite: bool = False, **options: Any
    ) -> ParameterOperator:
        """``(M + damping I)^-1`` as an operator: every product is a :meth:`solve`, ``indefinite`` or not, with these
        ``options``.
        """
        if "x0" in options:
            raise ArgumentError("an inverse takes no x0=: a first guess is of one vector; pass it to solve()")
        return ImplicitInverse(self, as_damping(damping), {"indefinite": indefinite, **options})

    def sample(self, n: int, damping: float | Tensor = 0.0, generator: Any = None) -> Any:
        """Not offered, whatever ``n``, ``damping`` and ``generator``; raises :class:`UnsupportedError`."""
        raise self.refusal("sample()")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise UnsupportedError(
            "an implicit matrix follows its model; move the model with model.to(...) and build it again"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "an implicit matrix holds a model and data, so it is not pickled; save a PMatKFAC, PMatEKFAC, ... instead"
        )

    def __repr__(self) -> str:
        team = f", over {self.run.team.size} processes: products are collective" if self.run.team.size > 1 else ""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device='{self.device}'{team})"

"""Fisher-Rao norm: the length of the parameters, as a vector, in the Fisher metric at these parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nngeom.core.given_plainly import require_real_tensor
from nngeom.cotangents.likelihood import Likelihood
from nngeom.measures.second_moments import FIM
from nngeom.pmat.implicit import PMatImplicit
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


def fisher_rao_norm(
    model: nn.Module,
    loader: Any,
    likelihood: str | Likelihood = "categorical",
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """``sqrt(<w, F w>)`` of the parameters ``w`` and the Fisher matrix ``F`` at them: a scalar; no matrix is formed.

    ``likelihood``: as for :func:`nngeom.FIM`, with the expectation over its labels: the model's Fisher-Rao norm, which
    takes no targets. ``layer_collection``: the parameters, all trainable ones by default. Any ``model`` is measured;
    other arguments as for :func:`nngeom.FIM`, and what it raises.

    Where ``f`` is positively homogeneous of degree ``L`` in these parameters (``L`` linear maps or convolutions without
    biases, with ReLU or leaky ReLU between, all trainable) ``J w = L f``, so that ``<w, F w> = L^2 mean_i f_i^T H_i
    f_i`` with the Fisher information ``H_i`` of the outputs, as in the paper; there, multiplying the weights into a
    unit and dividing those out of it changes nothing. With biases, or other activations, the closed form does not hold,
    the definition does. Source: Liang et al. 2019, definition 2, theorem 3.1.
    """
    fisher = FIM(
        model,
        loader,
        PMatImplicit,
        likelihood=likelihood,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        process_group=process_group,
    )
    w = PVector.from_model(model, fisher.layer_collection)
    square = fisher.vTMv(w)
    require_real_tensor(square, "the product with the Fisher matrix (see the inputs and the model)")
    return square.clamp_min(0).sqrt()

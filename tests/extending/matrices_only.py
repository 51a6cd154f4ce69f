"""An optimizer preset: Kronecker factors where parameters are matrices, the diagonal elsewhere."""

from typing import Any

from torch import nn

import nngeom as nng


class MatricesOnly(nng.optim.NaturalGradient):
    """KFAC for weights of two axes or more; biases, scales and shifts are divided by their own second moments.

    ``sharing``: of weights by positions, as for KFAC; ``options``: all others of ``NaturalGradient``.
    """

    def __init__(self, model: nn.Module, lr: Any = 0.01, *, sharing: str = "expand", **options: Any):
        collection = options.pop("layer_collection", None) or nng.LayerCollection.from_model(model)
        vectors = [name for name, shape in zip(collection.names, collection.shapes) if len(shape) < 2]
        kfac = nng.PMatKFAC.options(sharing=sharing)
        kept = nng.PMatMixed(dict.fromkeys(vectors, nng.PMatDiag), default=kfac)
        every = {"every": 10, "statistics_every": 10}
        super().__init__(model, kept, lr, layer_collection=collection, **{**every, **options})

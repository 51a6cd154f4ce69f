"""An analysis quantity: how much of a gradient is common to the examples."""

from dataclasses import dataclass

import torch

import nngeom as nng


@dataclass(frozen=True)
class SignalToNoise:
    """``ratio``: a number a parameter; ``by_layer``: squared norm of the mean over that of the deviations."""

    ratio: nng.PVector
    by_layer: dict[str, float]


def signal_to_noise(model, loader, loss, **settings) -> SignalToNoise:
    """``mean(g)**2 / var(g)`` of the gradients ``g`` of single examples' losses, parameter by parameter.

    ``settings`` are those of every measure (``function=``, ``memory_budget=``, ...). Source: Liu et al. 2020, eq. 2.
    """
    variance = nng.GradientCovariance(model, loader, nng.PMatDiag, loss=loss, **settings).diag()
    total, count = torch.zeros_like(variance.flat()), 0
    for chunk in nng.rows(model, loader, loss=loss, **settings):
        for layout, rows in chunk.jacobians.items():  # their J[k, n], in factored form: k = 1
            summed = rows.vjp(torch.ones(rows.shape[:2], dtype=rows.dtype, device=rows.device))
            layout.scatter_(total, layout.gather(total) + summed)
        count += chunk.examples
    signal = (total / count).square()
    collection, noise = variance.layer_collection, variance.to_dict()
    mean_squares = nng.PVector.from_flat(collection, signal).to_dict()
    of_layer = lambda numbers, names: float(sum(numbers[name].sum() for name in names))
    layers = collection.by_layer().items()
    by_layer = {layer: of_layer(mean_squares, names) / of_layer(noise, names) for layer, names in layers}
    return SignalToNoise(nng.PVector.from_flat(collection, signal / variance.flat()), by_layer)

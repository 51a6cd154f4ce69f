"""A model of time and memory of Kronecker factors over processes: a message of ``B`` bytes takes ``alpha + B / beta``.

All-reduce: ``2 alpha ceil(log2 W) + 2 (W - 1) / W * B / beta``; reduce-scatter, all-gather and broadcast half of it. An
eigendecomposition: ``start + seconds * (n / side) ** power``. Sums are float32, of symmetric ones 0.5625 are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, log2

Layers = list[tuple[int, int]]  # inputs, with the constant one of a bias, and outputs

HALF = 0.5625  # of a symmetric matrix: its upper strips
NUMBER = 4  # bytes


@dataclass(frozen=True)
class Constants:
    """Bytes a second and seconds: of messages inside of a node of so many processes and between nodes, and of an
    eigendecomposition of a matrix of so many rows.
    """

    node: float = 8
    inside: float = 350e9
    inside_latency: float = 3e-6
    between: float = 340e9
    between_latency: float = 10e-6
    eigh_start: float = 5e-3
    eigh_side: float = 4096
    eigh_seconds: float = 1.3
    eigh_power: float = 2.7

    def __post_init__(self) -> None:
        wrong = {f.name: getattr(self, f.name) for f in fields(self) if not 0 <= getattr(self, f.name) < float("inf")}
        above = ("node", "inside", "between", "eigh_side", "eigh_seconds", "eigh_power")
        zero = [name for name in above if getattr(self, name) == 0]
        if wrong or zero:
            raise ValueError(f"{wrong or zero}: expected finite numbers, above 0 but for latencies and eigh_start")

    def wire(self, size: int) -> tuple[float, float]:
        """Latency and bandwidth among so many processes."""
        if size <= self.node:
            return self.inside_latency, self.inside
        return self.between_latency, self.between

    def half(self, size: int, nbytes: float) -> float:
        """Seconds of a reduce-scatter, an all-gather or a broadcast."""
        latency, bandwidth = self.wire(size)
        return latency * ceil(log2(size)) + sent("broadcast", size, nbytes) / bandwidth

    def all_reduce(self, size: int, nbytes: float) -> float:
        """Seconds."""
        return 2 * self.half(size, nbytes)

    def broadcasts(self, size: int, nbytes: float) -> float:
        """Seconds of one broadcast by each process in turn, ``nbytes`` in all."""
        return self.half(size, nbytes) + (size - 1) * self.wire(size)[0] * ceil(log2(size))

    def eigh(self, side: float) -> float:
        """Seconds."""
        return self.eigh_start + self.eigh_seconds * (side / self.eigh_side) ** self.eigh_power


NETWORKS = {"fast": Constants(), "slow": Constants(between=22e9, between_latency=15e-6)}


def sent(kind: str, size: int, nbytes: float) -> float:
    """Bytes that a process sends, the mean over processes, of a collective of ``nbytes`` on each of them."""
    once = (size - 1) / size
    shares = {"all_reduce": 2 * once, "reduce": once, "broadcast": once, "all_gather": size - 1, "batch_isend_irecv": 1}
    return nbytes * shares[kind]


def loads(costs: Iterable[float], size: int) -> list[float]:
    """What each process has to do: the most expensive first, each to the one with least."""
    out = [0.0] * size
    for cost in sorted(costs, reverse=True):
        out[out.index(min(out))] += cost
    return out


def resnet50() -> Layers:
    """Its convolutions, without biases, and its head."""
    layers, inputs = [(3 * 49, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [(inputs, width), (width * 9, width), (width, 4 * width)]
            layers += [(inputs, 4 * width)] if block == 0 else []
            inputs = 4 * width
    return [*layers, (2049, 1000)]


NETS: dict[str, Layers] = {
    "ResNet-50": resnet50(),
    "GPT-2 small (blocks)": [(769, 2304), (769, 768), (769, 3072), (3073, 768)] * 12,
    "Llama-7B (blocks)": ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]) * 32,
}


def volumes(layers: Layers) -> dict[str, float]:
    """Bytes of the gradient, of the factors (as of their bases), and of their upper strips."""
    factors = NUMBER * sum(i * i + o * o for i, o in layers)
    return {"gradient": NUMBER * sum(i * o for i, o in layers), "factors": factors, "strips": HALF * factors}


def predicted(layers: Layers, size: int, at: Constants) -> dict[str, float]:
    """Seconds and bytes of EKFAC's curvature over ``size`` processes.

    ``merge``: the sums, once a sweep. ``replicated``: with all bases made by every process; ``assigned``: each factor's
    by one, and sent, with ``imbalance``, the longest load over the mean; ``owned``: bases stay with the owner of their
    layer. ``bases`` and ``owned_bases``: bytes kept by a process, spectra included; ``step``: what owners add to a
    step; ``gradient``: its all-reduce; ``every_batch``: factors summed after each of 1000 batches.
    """
    of = volumes(layers)
    by_side = loads((at.eigh(side) for layer in layers for side in layer), size)
    by_layer = loads((at.eigh(i) + at.eigh(o) for i, o in layers), size)
    merge = at.all_reduce(size, of["strips"])
    return {
        "merge": merge,
        "replicated": merge + sum(by_side),
        "assigned": merge + max(by_side) + at.broadcasts(size, of["factors"]),
        "imbalance": max(by_side) * size / sum(by_side),
        "bases": of["factors"] + of["gradient"],
        "owned": at.half(size, of["strips"]) + max(by_layer),
        "owned_bases": max(loads((NUMBER * (i * i + o * o + i * o) for i, o in layers), size)),
        "step": at.half(size, of["gradient"]),
        "gradient": at.all_reduce(size, of["gradient"]),
        "every_batch": 1000 * at.all_reduce(size, of["factors"]),
    }


def model(sizes: Sequence[int] = (8, 64, 1024), given: dict[str, float] | None = None) -> list[dict[str, object]]:
    """:func:`predicted` of every net, size and network, whose constants ``given`` replace; one network within a
    node.
    """
    networks = {name: replace(at, **(given or {})) for name, at in NETWORKS.items()}
    return [
        {"net": net, "ranks": size, "network": name, **predicted(layers, size, at)}
        for net, layers in NETS.items()
        for size in sizes
        for name, at in networks.items()
        if name == "fast" or size > at.node
    ]


def fitted(size: int, times: dict[int, float]) -> dict[str, float]:
    """Latency and bandwidth of so many processes that explain the seconds of all-reduces of two sizes in bytes."""
    (small, short), (large, long) = sorted(times.items())
    steps, share = 2 * ceil(log2(size)), sent("all_reduce", size, 1)
    if not short < long:
        raise ValueError(f"{large} bytes took {long} s and {small} took {short} s; measure again, with larger ones")
    bandwidth = share * (large - small) / (long - short)
    return {"inside": bandwidth, "inside_latency": max(0.0, short - share * small / bandwidth) / steps}

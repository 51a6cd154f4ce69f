"""In which program a model was looked at, and whether it is in another one by now."""

from __future__ import annotations

from nngeom.capture.network import Network
from nngeom.capture.program import program


def this_look(network: Network) -> int:
    """The number of the program in which this look at a model finds it, the same until it is looked at again."""
    looks = network.looks
    if looks.latest is None:
        looks.at(_now(network))
    return looks.latest or 0


def does_other_things(network: Network) -> bool:
    """Whether a model was looked at, and in no program as it is in now."""
    return bool(network.looks.all) and _now(network) not in network.looks.all


def looked_again(network: Network) -> None:
    """What is there now was looked at."""
    network.looks.at(_now(network))


def _now(network: Network) -> int:
    return program(network.places.modules, network.function, network.watch.carried)

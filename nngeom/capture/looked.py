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
    """Whether a model was looked at, and in no program as it is in now, or under factors of zero that are no more."""
    looks = network.looks
    return bool(looks.all) and (_now(network) not in looks.all or not all(f.hold() for f in looks.factors))


def looked_again(network: Network, anew: Network) -> None:
    """What is there now was looked at, as ``anew``."""
    network.looks.at(_now(network))
    network.looks.factors = anew.looks.factors


def _now(network: Network) -> int:
    return program(network.places.modules, network.function, network.watch.carried)

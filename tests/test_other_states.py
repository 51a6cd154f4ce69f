"""Random states of Python and NumPy, those of NumPy read from memory or as it gives them: what is drawn is put back."""

import random

import numpy as np
import pytest

from nngeom.capture import other_states
from nngeom.capture.other_states import OtherStates

DRAWS = {
    "a number": lambda: random.random(),
    "bits": lambda: random.getrandbits(64),
    "many": lambda: [random.random() for _ in range(700)],
    "a seed": lambda: random.seed(5),
    "the normal number in store": lambda: random.gauss(0, 1),
}


@pytest.fixture(autouse=True)
def before():
    kept = random.getstate(), np.random.get_state()
    random.seed(3)
    random.gauss(0, 1)  # makes two, of which one is in store
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])


@pytest.mark.parametrize("draw", DRAWS)
def test_what_python_draws_is_put_back(draw):
    state, held = random.getstate(), OtherStates()
    DRAWS[draw]()
    assert random.getstate() != state
    assert held.put_back() == "Python" and random.getstate() == state
    assert held.put_back() == ""


@pytest.mark.parametrize("from_memory", [True, False])
def test_what_numpy_draws_is_put_back(from_memory, monkeypatch):
    monkeypatch.setattr(other_states, "_memory_is_state", lambda: from_memory)
    state, held = np.random.get_state(), OtherStates()
    np.random.rand(3)
    random.random()
    assert held.put_back() == "Python and NumPy" and held.put_back() == ""
    now = np.random.get_state()
    assert now[2] == state[2] and (now[1] == state[1]).all()

"""Shared set-up: one thread, seeded, and the folder of the tests importable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file a process, so that what a module keeps is made once; all that starts processes itself in one of them."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "tests/distributed" if file.startswith("tests/distributed/") else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def own_kinds():
    """None but the library's representations are known, whatever other tests define."""
    from nngeom.core.registry import Registry, qualified
    from nngeom.pmat.representation import Measured

    registry = Registry()
    for cls in Measured.kinds.classes():
        if qualified(cls).startswith("nngeom."):
            registry.add(cls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measured, "kinds", registry)
        yield

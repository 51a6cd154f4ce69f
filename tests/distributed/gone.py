"""A process that hangs, and one that ends: the other says so, and who is missing."""

from __future__ import annotations

import os
import time

import cuts
import pytest
from launch import Check, Here, check

import nngeom as nng

CHECKS: dict[str, Check] = {}
PATIENCE = 4  # seconds a collective


@check(CHECKS)
def hangs(here: Here) -> None:
    case, known = cuts.data("mlp"), here.folder / "known"
    if here.rank == 1:
        while not known.exists():  # it ends when the other has said that it does not come
            time.sleep(0.05)
        os._exit(0)
    with pytest.raises(nng.PeerError, match="rank 1 of 2 did not come"):
        nng.FIM(case.model, case.loader, process_group=here.group)
    known.touch()


@check(CHECKS)
def ended(here: Here) -> None:
    case = cuts.data("mlp")
    with pytest.raises(nng.PeerError, match="did not come to the call"):
        nng.FIM(case.model, case.loader, process_group=here.group)

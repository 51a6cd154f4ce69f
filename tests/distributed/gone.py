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
    case = cuts.data("mlp")
    if here.rank == 1:
        time.sleep(3 * PATIENCE)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(nng.PeerError, match="rank 1 of 2 did not come"):
        nng.FIM(case.model, case.loader, process_group=here.group)
    assert time.monotonic() - start < 2.5 * PATIENCE


@check(CHECKS)
def ended(here: Here) -> None:
    case = cuts.data("mlp")
    with pytest.raises(nng.PeerError, match="did not come to the call"):
        nng.FIM(case.model, case.loader, process_group=here.group)

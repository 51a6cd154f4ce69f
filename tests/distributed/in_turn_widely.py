"""More models under ``fully_shard`` whose parameters are whole while they are used, of all kinds."""

from __future__ import annotations

from cases import STORED
from fully_sharded import WIDE
from in_turn import SMALL, listed
from launch import Check

CHECKS: dict[str, Check] = {}
for name in WIDE:
    listed(name, "kfac", by_child=False, checks=CHECKS)
    listed(name, "dense", "empirical", checks=CHECKS)
for name in SMALL:
    for kind in STORED:
        listed(name, kind, checks=CHECKS)

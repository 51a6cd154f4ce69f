"""Models in parts over several processes, of all kinds: one launch for all checks."""

from __future__ import annotations

import fully_sharded
import sharded_training
import tensor_parallel
from launch import Check

CHECKS: dict[str, Check] = fully_sharded.CHECKS | tensor_parallel.CHECKS | sharded_training.CHECKS

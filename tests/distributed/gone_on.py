"""Two processes that go on with what others had written that were killed: of a launch of ``killed``."""

from __future__ import annotations

import killed
from launch import Check

CHECKS: dict[str, Check] = {"goes on": killed.of_two}

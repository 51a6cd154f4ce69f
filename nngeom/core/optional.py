"""Libraries that one thing alone needs: imported when that is asked for, and named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from nngeom.core.errors import MissingExtraError


def optional(module: str, library: str = "") -> Any:
    """A module of another library; raises :class:`MissingExtraError`, which says how to install the ``library``."""
    name = library or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed; install it: pip install {name}") from error

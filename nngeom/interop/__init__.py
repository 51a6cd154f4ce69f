"""Matrices of this library inside of other people's, each module for one of them: ``nngeom.interop.laplace``."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """A module, imported when it is first asked for: it needs the library that it is for."""
    if name == "laplace":
        return importlib.import_module("nngeom.interop.laplace")
    raise AttributeError(f"module 'nngeom.interop' has no attribute {name!r}")

"""Forward mode as torch has it, without the warnings that torch gives of itself when it is first used."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
import torch.autograd.forward_ad as forward_ad


@functools.cache
def _load_rules() -> None:
    """Have torch compile its rules now; it does so at the first dual number, by what it calls deprecated itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """A level of dual numbers."""
    _load_rules()
    with forward_ad.dual_level():
        yield

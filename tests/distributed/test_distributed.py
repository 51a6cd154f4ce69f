"""Measures over several processes: what they say is in the modules of the same themes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import faults
import gone
import moments
import products
import training
from launch import launch


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a launch said, made when first asked for."""
    known = {}

    def of(theme, size):
        if (theme, size) not in known:
            known[theme, size] = launch(theme, size, tmp_path_factory.mktemp(f"{theme}-{size}"))
        return known[theme, size]

    return of


def asked(*themes, sizes=(2, 3), slow=(4,)):
    """The checks of themes in processes of so many ranks."""
    marked = [*sizes, *(pytest.param(size, marks=pytest.mark.slow) for size in slow)]
    listed = [(theme.__name__, name) for theme in themes for name in theme.CHECKS]
    return lambda f: pytest.mark.parametrize("size", marked)(pytest.mark.parametrize("theme, name", listed)(f))


@asked(moments, products, faults, training)
def test_over_processes(said, theme, name, size):
    said(theme, size).require(name)


@asked(gone, sizes=(2,), slow=())
def test_processes_that_are_gone(said, theme, name, size):
    said(theme, size).require(name, ranks=[0])

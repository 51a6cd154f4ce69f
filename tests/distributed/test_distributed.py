"""Measures over several processes: what they say is in the modules of the same themes."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import faults
import gone
import graphs
import in_files
import kernels
import killed
import moments
import owned
import parted
import products
import quantities
import training
from launch import launch
from torchrun import environment, torchrun


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a launch said, made when first asked for."""
    known = {}

    def of(theme, size):
        if (theme, size) not in known:
            known[theme, size] = launch(theme, size, tmp_path_factory.mktemp(f"{theme}-{size}"))
        return known[theme, size]

    return of


def asked(*themes, sizes, slow):
    """The checks of themes in processes of so many ranks."""
    marked = [*sizes, *(pytest.param(size, marks=pytest.mark.slow) for size in slow)]
    listed = [(theme.__name__, name) for theme in themes for name in theme.CHECKS]
    return lambda f: pytest.mark.parametrize("size", marked)(pytest.mark.parametrize("theme, name", listed)(f))


THEMES = (moments, products, quantities, kernels, graphs, in_files, faults, training, owned, parted)


@asked(*THEMES, sizes=(2, 3), slow=(4,))
def test_over_processes(said, theme, name, size):
    said(theme, size).require(name)


@asked(gone, sizes=(2,), slow=())
def test_processes_that_are_gone(said, theme, name, size):
    said(theme, size).require(name, ranks=[0])


@pytest.mark.slow
def test_processes_that_are_killed(tmp_path, monkeypatch):
    """In pairs: one of each is killed while it writes; then a pair goes on with what was written."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    said = launch("killed", 6, first)
    for name in killed.CHECKS:
        said.require(name, ranks=list(killed.LEFT))
    assert all("one_of_each_pair_is_killed" not in said.answers[rank] for rank in (1, 3, 5))
    monkeypatch.setenv("NNGEOM_LEFT", str(first))
    launch("gone_on", 2, second).require("goes on")


def test_the_example_under_torchrun(tmp_path):
    """In one process, and started by torchrun in two: the same matrix."""
    script = Path(__file__).parent.parent.parent / "examples" / "torchrun_fisher.py"
    command, options = [sys.executable, str(script)], {"env": environment(), "cwd": tmp_path, "timeout": 150}
    alone = subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
    both = torchrun(script, tmp_path, seconds=150)
    said = [[line for line in printed.splitlines() if "examples, trace" in line] for printed in (alone, both)]
    assert said[0] == said[1] and len(said[0]) == 1

"""Models in parts over several processes: what they say is in the module of the same theme."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import in_turn
import in_turn_widely
import meshes
import parts
from launch import launch


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return launch("parts", 2, tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("name", parts.CHECKS)
def test_parts(said, name):
    said.require(name)


@pytest.fixture(scope="module")
def in_turns(tmp_path_factory):
    """What launches of a theme in so many processes said, made when first asked for."""
    make = lambda theme, size: launch(theme, size, tmp_path_factory.mktemp(f"{theme}-{size}"))
    return functools.cache(make)


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
@pytest.mark.parametrize("name", in_turn.CHECKS)
def test_in_turn(in_turns, name, size):
    in_turns("in_turn", size).require(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", in_turn_widely.CHECKS)
def test_in_turn_widely(in_turns, name):
    in_turns("in_turn_widely", 2).require(name)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    return launch("meshes", 4, tmp_path_factory.mktemp("meshes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", meshes.CHECKS)
def test_meshes(crossed, name):
    crossed.require(name)

"""Models in parts over several processes: what they say is in the module of the same theme."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

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
def crossed(tmp_path_factory):
    return launch("meshes", 4, tmp_path_factory.mktemp("meshes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", meshes.CHECKS)
def test_meshes(crossed, name):
    crossed.require(name)

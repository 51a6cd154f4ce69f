"""Measures over several processes: what they say is in the modules of the same themes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import moments
from launch import launch


@pytest.fixture(scope="module", params=[2, 3])
def said(request, tmp_path_factory):
    return launch("moments", request.param, tmp_path_factory.mktemp("moments"))


@pytest.mark.parametrize("name", moments.CHECKS)
def test_moments(said, name):
    said.require(name)

"""The three examples of lazy training run, in a few steps, and say what their pages say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _examples(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    monkeypatch.chdir(tmp_path)


def arguments(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["example", *args])


def test_quadratic(monkeypatch, capsys, tmp_path):
    import lazy_quadratic as example

    monkeypatch.setattr(
        example, "network", lambda data, groups, regime, activation, seed: example.quadratic(data, groups, regime)
    )
    arguments(monkeypatch, "--seeds", "1")
    example.main()
    assert (tmp_path / "out/lazy_quadratic.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "nonlinear  error at half the loss: example 1 0.87, example 3 0.65, example 5 0.31" in printed
    assert "linear     error at half the loss: example 1 0.36, example 3 0.45, example 5 0.57" in printed


def test_a_two_layer_network_learns_clean_examples_first(monkeypatch):
    import lazy_quadratic as example

    data, groups = example.problems()["2: label noise"]
    for regime in ("linear", "nonlinear"):
        curves = example.at_levels(example.network(data, groups, regime, torch.nn.Identity(), 0))
        assert curves["clean"][24] < 0.4 < 0.9 < curves["noisy"][24]


def test_yin_yang(monkeypatch, capsys, tmp_path):
    import lazy_yin_yang as example

    whole = example.descend
    monkeypatch.setattr(example, "descend", lambda *args, **options: whole(*args, **{**options, "steps": 40}))
    monkeypatch.setattr(example, "LEVELS", [0.69, 0.68, 0.6, 0.1])
    arguments(monkeypatch, "--seeds", "2")
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning):  # nobody reaches 0.1: means of nothing
        example.main()
    assert "0.1" in capsys.readouterr().out and (tmp_path / "out/lazy_yin_yang.png").exists()
    kept = np.load(tmp_path / "out/lazy_yin_yang/1.npz")
    assert (
        np.isfinite(kept["difference"][:2]).all()
        and np.isnan(kept["difference"][3]).all()
        and (kept["kernel"][1, :2] > 0.999).all()
    )
    easy, disks = example.regions().values()
    assert easy.any() and disks.any() and not (easy & disks).any()


def test_digits(monkeypatch, capsys, tmp_path):
    import lazy_digits as example

    monkeypatch.setattr(
        example, "c_scores", lambda x, y, sizes, repeats, seed: SimpleNamespace(score=torch.rand(len(x)))
    )
    for name in example.LIMITS:
        monkeypatch.setitem(example.LIMITS, name, (0.0, 8))
    arguments(monkeypatch, "--seeds", "1")
    example.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name}: means of 1 seed " in printed for name in example.LIMITS)
    assert (tmp_path / "out/lazy_digits.png").stat().st_size > 10_000
    example.main()  # everything is on file
    assert "steps" not in capsys.readouterr().out.split("\nnoise")[0]
    arguments(monkeypatch, "--quick")
    example.main()  # kept apart
    assert "spurious seed 0 alpha 1: 8 steps" in capsys.readouterr().out

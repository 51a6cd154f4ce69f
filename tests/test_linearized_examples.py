"""The examples of lazy training: their problems are what they should be, and say what their pages say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))


def test_quadratic():
    import lazy_quadratic as example

    half = {}
    for title, problem in example.problems().items():
        for regime in example.REGIMES:
            found = example.solved(*problem, regime)
            assert found["gap"] < 1e-8
            half[title[0], regime] = [round(float(found["closed"][g][example.HALF]), 2) for g in problem[1].members]
    assert half["1", "nonlinear"] == [0.87, 0.65, 0.31] and half["1", "linear"] == [0.36, 0.45, 0.57]
    assert all(first < 0.4 < 0.9 < last for (which, _), (first, last) in list(half.items())[2:] if which != "1")


def test_a_two_layer_network_learns_clean_examples_first(monkeypatch):
    import lazy_quadratic as example

    data, groups = example.problems()["2: label noise"]
    for regime in ("linear", "nonlinear"):
        curves = example.at_levels(example.network((data, groups), regime, torch.nn.Identity(), 6000, 0))
        assert curves["clean"][24] < 0.4 < 0.9 < curves["noisy"][24]


def test_yin_yang(monkeypatch, tmp_path):
    """The mean map is that of all seeds however they came; what no seed reaches is left out."""
    import lazy_yin_yang as example

    monkeypatch.setattr(example, "LEVELS", [0.69, 0.68, 0.6, 0.1])
    args = ["--steps", "40", "--out", str(tmp_path)]
    for seeds in ("1", "2"):
        example.main([*args, "--seeds", seeds])
    cells = json.loads((tmp_path / "data/lazy_yin_yang.json").read_text())["cells"]
    maps = [example.one_seed(seed, 40)[0] for seed in (0, 1)]
    assert cells["maps"]["seeds"] == [2, 2, 2, 0] and all(bool(m[3].isnan().all()) for m in maps)
    found = torch.tensor(cells["maps"]["mean"][:3], dtype=torch.float64)
    torch.testing.assert_close(found, (0.5 * (maps[0] + maps[1]))[:3], rtol=1e-3, atol=1e-4)
    easy, disks = example.regions().values()
    assert easy.any() and disks.any() and not (easy & disks).any()
    for name, mask in example.regions().items():
        got = torch.tensor(cells["seed/1"][name][:3], dtype=torch.float64)
        torch.testing.assert_close(got, maps[1][:3, mask].mean(1), rtol=1e-3, atol=1e-6)
    assert all(v > 0.999 for v in cells["seed/1"]["kernel"][1][:2])


def test_digits(monkeypatch):
    """At equal progress; a run that does not get there leaves no number, and the tables say so."""
    import lazy_digits as example
    import lazy_digits_figure as figure

    torch.manual_seed(0)
    monkeypatch.setattr(example, "c_scores", lambda x, *args, **kw: SimpleNamespace(score=torch.rand(len(x))))
    args = SimpleNamespace(data=None, quick=True)
    run = example.run("noise", 1.0, 0, args)
    level = [0.5 * float(run["clean"][3] + run["clean"][4]), 1e-3]
    found = figure.resampled({"noise/1/0": {k: v.tolist() for k, v in run.items()}}, "noise", 1.0, level)
    close = 0.5 * float(run["noisy"][3] + run["noisy"][4])
    assert abs(found["noisy"][0, 0] - close) < 1e-9 and found["noisy"][0, 1] != found["noisy"][0, 1]
    assert figure.shown(found["noisy"][:, 1]) == "-" and figure.difference(found["noisy"][:, 1]) == "-"
    x, y, outputs, _ = example.experiment("spurious", 0, args)
    agree = (x[:, -1] > 0) == (y > 0)
    assert outputs == 2 and x.shape == (600, 65) and 0.5 < float(agree.double().mean()) < 0.8

"""Architectures of ``transformers``: a few of the list against autograd, and the page that shows all of them."""

from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import benchmarks.report as report
from examples import architecture_types as types
from examples.architecture_zoo import ZOO
from examples.architectures import DOCS, main, markdown, trial

SOME = ("BERT", "GPT-2", "Llama", "Mixtral", "Mamba", "T5", "ResNet", "SegFormer", "wav2vec 2.0", "CLIP")


def tried(name, seed):
    """What became of an architecture, where ``transformers`` runs it in float64 by itself."""
    try:
        return trial(name, seed)
    except RuntimeError as error:
        if "without overflow" not in str(error):  # of masks made in float32, in transformers 4.57
            raise
        pytest.skip(f"transformers {version('transformers')} does not run it in float64: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOME)
def test_usual_architectures_are_exact(name):
    found = tried(name, seed=1)
    assert found["outcome"] == "exact", found["reason"]


@pytest.mark.filterwarnings("ignore")
def test_similarities_within_a_batch_are_exact_or_refused():
    found = tried("CLIP, similarities", seed=1)
    assert found["outcome"] == "exact" or "mixes" in found["reason"], found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2, 5))
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_exact_or_refused(name, seed):
    found = tried(name, seed)
    assert found["outcome"] in ("exact", "refused"), found["reason"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "mamba", "mixtral", "t5", "vit"])
def test_types_are_exact_example_by_example(name):
    assert types.outcome(name) == ("exact", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["clip", "owlvit"])
def test_similarities_of_texts_and_images_are_refused(name):
    kind, why = types.outcome(name)
    assert kind == "refused" and "mixes" in why


def test_the_page_tells_what_became_of_every_type():
    results = report.load(str(DOCS / "data" / "architecture_types.json"))
    assert {kind for kind, _ in results["types"].values()} <= {"exact", "refused", "left out"}
    assert types.sentence(results) in (DOCS / "architectures.md").read_text()


def test_the_page_shows_the_file():
    results = report.load(str(DOCS / "data" / "architectures.json"))
    assert [r["name"] for r in results["trials"]] == list(ZOO) and len(ZOO) == 50
    assert {r["outcome"] for r in results["trials"]} <= {"exact", "refused"}
    assert markdown(results) in (DOCS / "architectures.md").read_text()


def test_a_run_writes_the_page(tmp_path, capsys):
    """From the file to the page, and a run of one architecture, which writes nothing."""
    (tmp_path / "data").mkdir()
    for name in ("architectures.md", "data/architectures.json"):
        (tmp_path / name).write_text((DOCS / name).read_text().replace(" encoder ", " other "))
    main(["--render", "--docs", str(tmp_path)])
    assert Path(tmp_path / "architectures.md").read_text() == (DOCS / "architectures.md").read_text()
    main(["--only", "RoBERTa", "--seed", "3", "--docs", str(tmp_path)])
    assert "Of 1: 1 exact" in capsys.readouterr().out

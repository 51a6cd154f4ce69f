"""The table of the page for those who come from kronfluence: every row of it, the numbers of both beside each other."""

import copy
import logging

import pytest
import torch
from pairs import Pairs
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import TensorDataset

import nngeom as nng

pytest.importorskip("kronfluence", reason="kronfluence is not installed")
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

from benchmarks.against_kronfluence import FACTOR_DTYPES, SCORE_DTYPES, quiet

f64 = torch.float64
PAIRS = Pairs("kronfluence")
DAMPING = 1e-2


def margin(outputs, targets):
    """The logit of the label less the log of the sum of the others."""
    own = outputs.gather(1, targets[:, None])[:, 0]
    return own - outputs.scatter(1, targets[:, None], -torch.inf).logsumexp(1)


class Classify(Task):
    """The loss of a batch, which queries are measured by too, or by a margin; of the layers that are ``tracked``."""

    def __init__(self, *, tracked=None, margins=False):
        self.tracked, self.margins = tracked, margins

    def compute_train_loss(self, batch, model, sample=False):
        outputs = model(batch[0])
        labels = torch.distributions.Categorical(logits=outputs.detach()).sample() if sample else batch[1]
        return F.cross_entropy(outputs, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return margin(model(batch[0]), batch[1]).sum() if self.margins else self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.tracked


class Model:
    """A net, training examples and queries."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder, self.runs = folder, 0
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.train, self.queries = ((torch.randn(n, 6, dtype=f64), torch.randint(0, 3, (n,))) for n in (40, 5))

    def there(self, what="pairwise", *, strategy="ekfac", empirical=True, task=None, **options):
        """Scores of theirs."""
        task, self.runs = task or Classify(), self.runs + 1
        factors = FactorArguments(
            strategy=strategy, use_empirical_fisher=empirical, **dict.fromkeys(FACTOR_DTYPES, f64)
        )
        score = ScoreArguments(**{"damping_factor": DAMPING, **options}, **dict.fromkeys(SCORE_DTYPES, f64))
        train, size = TensorDataset(*self.train), {"per_device_train_batch_size": 8}
        with quiet():
            analyzer = Analyzer(
                "a",
                prepare_model(copy.deepcopy(self.net), task),
                task,
                cpu=True,
                output_dir=str(self.folder / str(self.runs)),
                disable_tqdm=True,
                log_level=logging.ERROR,
            )
            analyzer.fit_all_factors("f", train, per_device_batch_size=8, factor_args=factors)
            if what == "self":
                analyzer.compute_self_scores("s", "f", train, score_args=score, **size)
                return analyzer.load_self_scores("s")["all_modules"]
            size["per_device_query_batch_size"] = 5
            queries = TensorDataset(*self.queries)
            analyzer.compute_pairwise_scores("s", "f", queries, train, score_args=score, **size)
            return analyzer.load_pairwise_scores("s")["all_modules"]

    def matrix(self, **options):
        return nng.EmpiricalFIM(self.net, self.train, nng.PMatEKFAC, loss="cross_entropy", **options)

    def here(self, matrix=None, **options):
        options = {"loss": "cross_entropy", "damping": DAMPING, **options}
        return nng.influence(self.net, self.train, self.queries, matrix or self.matrix(), **options)


def agree(here, there):
    scale = float(there.abs().max())
    assert_close(here / scale, there.to(f64) / scale, rtol=0, atol=1e-6)


@PAIRS.of("`Task.compute_train_loss`")
def train_loss(m):
    agree(m.here().scores, m.there())


@PAIRS.of("`Task.compute_measurement`")
def measurement(m):
    agree(m.here(query_function=margin).scores, m.there(task=Classify(margins=True)))


@PAIRS.of("`prepare_model`, `Analyzer(...)`")
def nothing(m):
    names = [name for name, _ in m.net.named_modules()]
    m.here()
    assert [name for name, _ in m.net.named_modules()] == names


@PAIRS.of('`analyzer.fit_all_factors(strategy="ekfac")`')
def drawn(m):
    """Labels are drawn by both: scores are as near as draws allow, and nearer to each other than to other matrices'."""
    there = m.there(empirical=False, damping_factor=0.1)
    drawn, exact = (
        m.here(matrix, damping=0.1).scores
        for matrix in (
            nng.FIM_MonteCarlo(m.net, m.train, nng.PMatEKFAC),
            nng.GGN(m.net, m.train, nng.PMatEKFAC, loss="cross_entropy"),
        )
    )
    apart = lambda x, y: float((x - y).norm() / y.norm())
    assert 1e-6 < apart(there.to(f64), exact) < 0.3 and 1e-6 < apart(drawn, exact) < 0.3


@PAIRS.of("`use_empirical_fisher=True`")
def empirical(m):
    agree(m.here(m.matrix()).scores, m.there(empirical=True))


@PAIRS.of('`strategy="diagonal"`, `strategy="kfac"`')
def others(m):
    for strategy, kind in (("diagonal", nng.PMatDiag), ("kfac", nng.PMatKFAC)):
        matrix = nng.EmpiricalFIM(m.net, m.train, kind, loss="cross_entropy")
        agree(m.here(matrix).scores, m.there(strategy=strategy))


@PAIRS.of('`strategy="identity"`')
def identity(m):
    matrix = nng.PMatEye.build(nng.LayerCollection.from_model(m.net), 1.0, dtype=f64)
    agree(m.here(matrix, damping=0.0).scores, m.there(strategy="identity"))


@PAIRS.of("`compute_pairwise_scores`")
def pairwise(m):
    assert m.here().scores.shape == m.there().shape == (5, 40)


@PAIRS.of("`compute_self_scores`")
def self_scores(m):
    agree(m.here().self_scores, m.there("self"))


@PAIRS.of("`damping_factor=None`")
def default_damping(m):
    agree(m.here(damping=nng.Relative(0.1)).scores, m.there(damping_factor=None))


@PAIRS.of("`Task.get_influence_tracked_modules`")
def tracked(m):
    last = nng.LayerCollection.from_model(m.net, include=["2"])
    agree(m.here(m.matrix(layer_collection=last)).scores, m.there(task=Classify(tracked=["2"])))


@PAIRS.of("`query_gradient_low_rank`, `data_partitions`")
def in_pieces(m):
    there = m.there(data_partitions=2)
    agree(m.here(memory_budget=20_000).scores, there)
    best = m.here(top=3)
    assert torch.equal(best.indices, there.to(f64).topk(3).indices)


@PAIRS.of("sums over examples in factors")
def scales(m):
    """Neither a sign nor a number of examples is between the scores."""
    agree(m.here().scores, m.there())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", PAIRS)
def test_numbers_are_those_of_kronfluence(row, tmp_path):
    PAIRS[row](Model(tmp_path))


def test_every_row_is_compared():
    PAIRS.require_all()

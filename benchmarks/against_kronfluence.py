"""``python -m benchmarks.against_kronfluence``: influence of one model beside kronfluence's, the matrix and its scores.

Both have the second moment of the loss gradients of all training examples, in the eigenbasis of its factors, and the
same damping; scores must agree before anything is timed. ``--docs PAGE`` writes the table between its marks. Needs
``kronfluence``, which writes its factors and scores to files; ours stay in memory, and have self-scores beside.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import nngeom as nng
from benchmarks import report
from benchmarks.timing import interleaved
from benchmarks.workloads import workload

DAMPING = 1e-3
FACTOR_DTYPES = (
    "activation_covariance_dtype",
    "gradient_covariance_dtype",
    "per_sample_gradient_dtype",
    "lambda_dtype",
)
SCORE_DTYPES = ("score_dtype", "per_sample_gradient_dtype", "precondition_dtype")


class Classification(Task):
    """The sum of cross-entropies, which queries are measured by too."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Of the labels of the batch."""
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The loss of the queries."""
        return self.compute_train_loss(batch, model)


@dataclass(frozen=True)
class Both:
    """A model, a training set and queries, as tensors."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    batch: int = 128

    def ours(self) -> Tensor:
        """``(q, n)``."""
        train = list(zip(*(t.split(self.batch) for t in self.train)))
        matrix = nng.EmpiricalFIM(self.model, train, nng.PMatEKFAC, loss="cross_entropy")
        options = {"loss": "cross_entropy", "damping": DAMPING}
        return nng.influence(self.model, train, self.queries, matrix, **options).scores

    def theirs(self) -> Tensor:
        """``(q, n)``."""
        task, dtype = Classification(), self.train[0].dtype
        model = prepare_model(copy.deepcopy(self.model), task)
        factor_args = FactorArguments(
            strategy="ekfac", use_empirical_fisher=True, **dict.fromkeys(FACTOR_DTYPES, dtype)
        )
        score_args = ScoreArguments(damping_factor=DAMPING, **dict.fromkeys(SCORE_DTYPES, dtype))
        train, queries = TensorDataset(*self.train), TensorDataset(*self.queries)
        with tempfile.TemporaryDirectory() as folder, quiet():
            analyzer = Analyzer(
                "a", model, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=logging.ERROR
            )
            analyzer.fit_all_factors("f", train, per_device_batch_size=self.batch, factor_args=factor_args)
            sizes = {"per_device_query_batch_size": len(queries), "per_device_train_batch_size": self.batch}
            analyzer.compute_pairwise_scores("s", "f", queries, train, score_args=score_args, **sizes)
            return analyzer.load_pairwise_scores("s")["all_modules"]

    def error(self) -> float:
        """The largest difference, relative to the largest score."""
        ours, theirs = self.ours(), self.theirs()
        return float((ours - theirs).abs().max() / theirs.abs().max())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def of_workload(name: str, n: int, q: int) -> Both:
    """Of ``n`` examples and ``q`` queries of one of the workloads."""
    w, queries = workload(name, n, n), workload(name, q, q)
    return Both(w.model, w.batches[0], queries.batches[0])


def main(argv: list[str] | None = None) -> None:
    """Print one line a workload and number of queries."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_kronfluence", description=__doc__)
    parser.add_argument("--workload", nargs="*", default=["W1", "W3"])
    parser.add_argument("--queries", nargs="*", type=int, default=[8, 200])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [
        "| workload | queries | largest difference | kronfluence / nngeom | floors: nngeom, kronfluence |",
        "|---|---|---|---|---|",
    ]
    for name in options.workload:
        for q in options.queries:
            both = of_workload(name, options.examples, q)
            error = both.error()
            if error > 1e-3:
                raise SystemExit(f"{name} q={q}: scores differ by {error:.1e} of the largest")
            floor = workload(name, options.examples, 128).floor
            runs: dict[str, Callable[[], Any]] = {"nngeom": both.ours, "kronfluence": both.theirs}
            found = {k: s.summary() for k, s in interleaved(floor, runs, options.repeats).items()}
            mine, other = found["nngeom"], found["kronfluence"]
            ratio = other["median_ms"] / mine["median_ms"]
            lines.append(f"| {name} | {q} | {error:.0e} | {ratio:.1f} | {mine['ratio']:.1f}, {other['ratio']:.1f} |")
            print(lines[-1], flush=True)
    if options.docs:
        report.into(options.docs, "kronfluence", "\n".join(lines))


if __name__ == "__main__":
    main()

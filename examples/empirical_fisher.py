"""What the empirical Fisher matrix is not: its steps on a linear regression, its course along training, in every form.

    python examples/empirical_fisher.py [--data FOLDER] [--seeds 3] [--quick]

(a) Linear regression in two parameters on data that the model fits well, with noise far from the assumed one, and of
another shape: the field of steps of gradient descent, of natural gradient descent, and with the empirical Fisher.
(b) A tanh net of 2050 parameters on MNIST shrunk to 7 x 7, clean or with a fifth of the labels flipped: Fisher,
empirical Fisher and covariance of gradients beside the Hessian, all dense, along training; and what block-diagonal,
Kronecker and diagonal forms of each lose, those of the Hessian and of the covariance in the eigenbasis of Kronecker
factors too (George 2023, thesis, section 4.2.4).

Protocol: Kunstner, Balles and Hennig 2019, figures 1 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, band, corrupt, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

PAGE = "papers.md"
LABELS = {"clean": 0.0, "a fifth flipped": 0.2}
FORMS = {"BlockDiag": nng.PMatBlockDiag, "EKFAC": nng.PMatEKFAC, "KFAC": nng.PMatKFAC, "Diag": nng.PMatDiag}
RELATIVE_DAMPING = 1e-2


def matrix(name: str, model: nn.Module, batch: Any, form: Any = nng.PMatDense) -> Any:
    """One of the four matrices over the parameters."""
    if name == "Fisher":
        return nng.FIM(model, batch, form)
    makers = {"empirical": nng.EmpiricalFIM, "covariance": nng.GradientCovariance, "Hessian": nng.Hessian}
    return makers[name](model, batch, form, loss="cross_entropy")


def forms_of(name: str) -> list[str]:
    """The forms that there are of a matrix: centred rows and Hessians are no average of Kronecker products."""
    return [f for f in FORMS if f != "KFAC" or name in ("Fisher", "empirical")]


def look(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Every dense matrix against the Hessian, the empirical step against the natural one, every form of each matrix."""
    whole = {name: matrix(name, model, (x, y)) for name in ("Fisher", "empirical", "covariance", "Hessian")}
    dense = {name: m.to_dense() for name, m in whole.items()}
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    gradient = nng.PVector.from_grad(model)
    model.zero_grad()
    damping = {
        name: RELATIVE_DAMPING * float(whole[name].trace()) / len(dense[name]) for name in ("Fisher", "empirical")
    }
    natural, other = (whole[name].solve(gradient, damping[name]) for name in ("Fisher", "empirical"))
    cosine = lambda a, b: float((a * b).sum() / (a.norm() * b.norm()))
    return {
        "loss": float(loss.detach()),
        "gradient": float(gradient.norm()),
        "with the Hessian": {name: cosine(m, dense["Hessian"]) for name, m in dense.items() if name != "Hessian"},
        "trace": {name: float(m.trace()) for name, m in whole.items()},
        "step cosine": cosine(natural.flat(), other.flat()),
        "step ratio": float(other.norm() / natural.norm()),
        "forms": {name: losses(name, model, (x, y), m) for name, m in dense.items()},
    }


def losses(name: str, model: nn.Module, batch: Any, dense: Tensor) -> dict[str, float]:
    """Relative Frobenius errors of the forms of a matrix."""
    error = lambda form: float((matrix(name, model, batch, FORMS[form]).to_dense() - dense).norm() / dense.norm())
    return {form: error(form) for form in forms_of(name)}


def trained(data: Data, labels: str, points: tuple[int, ...], width: int, seed: int) -> dict[str, Any]:
    """One training, looked at ``points``."""
    y = corrupt(data.y, LABELS[labels], torch.Generator().manual_seed(seed))
    x = F.adaptive_avg_pool2d(data.x, 7).flatten(1).double()
    torch.manual_seed(seed)
    layers = [nn.Linear(49, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    model, seen = nn.Sequential(*layers).double(), {}

    def visit(step: int) -> None:
        if step in points:
            seen[str(step)] = look(model, x, y)

    descend(model, x, y, visit, steps=max(points), lr=0.1, seed=seed, batch=50)
    return seen


def regressions() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and targets: of the model, with noise of a tenth of the assumed spread, and of another shape."""
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(400, 1, dtype=torch.float64, generator=g) for _ in range(2))
    return {
        "as the model says": (x, 2 * x + 2 + noise),
        "less noise": (x, 2 * x + 2 + 0.1 * noise),
        "another shape": (x, 2 * x + 2 + 1.5 * (x.square() - 1) + 0.3 * noise),
    }


def fields(side: int) -> dict[str, Any]:
    """For each regression the steps of the three methods on a grid of slopes and offsets around the best."""
    line = torch.linspace(-1.5, 1.5, side, dtype=torch.float64)
    model, found = nn.Linear(1, 1).double(), {}
    for name, (x, y) in regressions().items():
        best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), y).solution.flatten()
        steps: dict[str, list[Any]] = {"gradient": [], "natural": [], "empirical": []}
        for offset in torch.cartesian_prod(line, line):
            nn.utils.vector_to_parameters(best + offset, model.parameters())
            model.zero_grad()
            (0.5 * (model(x) - y).square().mean()).backward()
            g = nng.PVector.from_grad(model)
            steps["gradient"].append((-g).flat())
            steps["natural"].append(-nng.FIM(model, (x, y), nng.PMatDense, likelihood="gaussian").solve(g, 0.0).flat())
            steps["empirical"].append(-nng.EmpiricalFIM(model, (x, y), nng.PMatDense, loss="mse").solve(g, 0.0).flat())
        target = -torch.cartesian_prod(line, line)
        away = target.norm(dim=1) > 0
        aims = {k: F.cosine_similarity(torch.stack(v)[away], target[away], dim=1).mean() for k, v in steps.items()}
        found[name] = {
            "steps": {k: torch.stack(v) for k, v in steps.items()},
            "aim": {k: float(v) for k, v in aims.items()},
        }
    return {"line": line, "data": found}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Cosines with the way to the optimum; the course of training; the forms at its end."""
    data = cells["regression"]["data"]
    fields_ = table(["cosine with the way", *next(iter(data.values()))["aim"]], [
        [name, *(f"{v:.2f}" for v in found["aim"].values())] for name, found in data.items()
    ])  # fmt: skip
    rows, forms = [], []
    for labels in LABELS:
        runs = seeds_of(cells, labels)
        for step in runs[0]:
            got = [run[step] for run in runs]
            row = [labels, step, spread([g["loss"] for g in got], ".2g")]
            row += [spread([g["with the Hessian"][m] for g in got]) for m in ("Fisher", "empirical", "covariance")]
            row += [spread([g["trace"]["empirical"] / g["trace"]["Fisher"] for g in got], ".2g")]
            rows.append(
                [*row, spread([g["step cosine"] for g in got], ".2g"), spread([g["step ratio"] for g in got], ".2g")]
            )
        for name in ("Fisher", "empirical", "covariance", "Hessian"):
            last = [run[list(run)[-1]]["forms"][name] for run in runs]
            forms.append([f"{name}, {labels}", *(spread([g.get(f) for g in last]) for f in FORMS)])
    head = ["labels", "step", "loss", *(f"cos({m}, Hessian)" for m in ("F", "EF", "covariance")), "tr EF / tr F"]
    return {
        "empirical_fisher_fields": fields_,
        "empirical_fisher": table([*head, "cos of steps", "length of steps, EF / F"], rows),
        "empirical_fisher_forms": table(["relative error at the end", *FORMS], forms),
    }


def draw(cells: dict[str, Any], path: Any) -> None:
    """Fields of steps above; cosines, lengths and traces along training below."""
    fields_ = cells["regression"]
    fig, axes = figure(2, 3, 11, 7)
    line = torch.tensor(fields_["line"])
    grid = torch.cartesian_prod(line, line)
    for ax, (name, found) in zip(axes[0], fields_["data"].items()):
        for colour, width, (method, steps) in zip(COLOURS, (0.009, 0.006, 0.003), found["steps"].items()):
            v = torch.tensor(steps)
            v = v / v.norm(dim=1).clamp_min(1e-9).amax()
            ax.quiver(*grid.T, *v.T, color=colour, label=method, scale=14, width=width)
        ax.plot(0, 0, "k+")
        ax.set(title=f"regression: {name}", xlabel="slope less the best", ylabel="offset less the best")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8.5)
    for j, labels in enumerate(LABELS):
        runs = seeds_of(cells, labels)
        x = [max(int(step), 1) for step in runs[0]]
        style = "-" if j == 0 else "--"
        for colour, name in zip(COLOURS, ("Fisher", "empirical", "covariance")):
            values = [[run[s]["with the Hessian"][name] for s in run] for run in runs]
            band(axes[1, 0], x, values, f"{name}, {labels}", colour, ls=style)
        for ax, key in ((axes[1, 1], "step cosine"), (axes[1, 2], "step ratio")):
            band(ax, x, [[run[s][key] for s in run] for run in runs], labels, COLOURS[3], ls=style)
    titles = (
        "cosine of matrices with the Hessian",
        "cosine of natural and empirical steps",
        "empirical / natural step",
    )
    for ax, title in zip(axes[1], titles):
        ax.set(title=title, xlabel="step (1: before training)", xscale="log")
        ax.legend(fontsize=7)
    axes[1, 2].set(yscale="log")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Regressions and nets, three tables, one figure."""
    args = options(__doc__, argv, seeds=3, examples=500, width=24)
    if args.quick:
        args.examples, args.width = 30, 5
    points = (0, 2) if args.quick else (0, 30, 200, 1000, 5000)
    data = images(args.data, args.examples, 10)
    cells = Cells(args, "empirical_fisher", examples=args.examples, points=points, width=args.width)
    cells.add("regression", lambda: fields(3 if args.quick else 9))
    for labels in LABELS:
        for seed in range(args.seeds):
            cells.add(f"{labels}/{seed}", lambda n=labels, s=seed: trained(data, n, points, args.width, s))
    draw(cells.cells, args.out / "images" / "empirical_fisher.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()

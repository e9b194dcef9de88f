"""Universal approximation: MoL against a dot product of the same budget, on matrices of known rank.

A matrix of similarities of 128 queries and 128 items is fitted: a random one of some rank, and one in which each query
has one item of its own (the identity). Both sides have a vector of 16 numbers each. The best dot product of 16 numbers
is known (the first 16 singular values; Eckart & Young 1936). MoL lifts the same 16 numbers into 1, 4, 16 or 64 pairs of
components. Its network is shared by all queries and items; the table says how many numbers that is, against the 16,384
of the matrix: so small a matrix says what can be represented, not what is learned of others. The error is the share of
the matrix's squares that is left, at the best moment of the training: 0 is a perfect fit, 1 the fit by zeros.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.studies.machine import processor
from pipeline.config import Config
from pipeline.model.mol import MixtureOfLogits
from pipeline.settings import MolSettings

log = logging.getLogger("nightrails")

NUM_QUERIES = NUM_ITEMS = 128
DIM = 16
RANKS = (8, 16, 32, 64, 128)
IDENTITY = "identity"
COMPONENTS = (1, 2, 4, 8)  # on each side; their squares are the numbers of pairs
LARGEST = 15.0  # of the similarities fitted: within the reach of MoL's logits, 1 / temperature


class Fit(Config):
    """The errors for one matrix."""

    matrix: str
    dot_product: float
    mol: tuple[float, ...]  # by the number of pairs


def main(folder: Path, steps: int) -> None:
    """Fit every matrix, then print, write and draw."""
    torch.set_num_threads(1)
    fits = []
    for name in [*(str(rank) for rank in RANKS), IDENTITY]:
        matrix = make_matrix(name)
        errors = tuple(fit_mol(matrix, components, steps) for components in COMPONENTS)
        fits.append(Fit(matrix=name, dot_product=best_dot_product(matrix), mol=errors))
        log.info("%s", fits[-1])
    folder.mkdir(parents=True, exist_ok=True)
    text = table(fits)
    print(text, flush=True)
    title = f"`python jobs/study.py approximation`, {steps:,} steps of Adam; one thread of {processor()}"
    (folder / "approximation.md").write_text(f"{title}\n\n![The errors](approximation.svg)\n\n{text}\n")
    draw(fits, folder / "approximation.svg")


def make_matrix(name: str) -> Tensor:
    """(queries, items) similarities of this rank, or the identity; the largest is LARGEST and the mean is 0."""
    if name == IDENTITY:
        matrix = torch.eye(NUM_QUERIES)
    else:
        generator = torch.Generator().manual_seed(int(name))
        left, right = (torch.randn(NUM_QUERIES, int(name), generator=generator) for _ in range(2))
        matrix = left @ right.mT
    matrix = matrix - matrix.mean()
    return matrix * (LARGEST / matrix.abs().max())


def best_dot_product(matrix: Tensor) -> float:
    """The error of the best matrix of rank DIM."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares[DIM:].sum() / squares.sum())


def make_mol(components: int) -> MixtureOfLogits:
    """MoL with so many components on each side, without dropout."""
    settings = MolSettings(
        num_query_components=components,
        num_item_components=components,
        component_dim=DIM,
        gate_dropout=0.0,
        first_pair_share=0.0,
        item_dropout=0.0,
        cross_dropout=0.0,
    )
    return MixtureOfLogits(DIM, settings)


def num_shared(components: int) -> int:
    """The numbers of the network that all queries and items share."""
    return sum(weight.numel() for weight in make_mol(components).parameters())


def fit_mol(matrix: Tensor, components: int, steps: int) -> float:
    """The least error of MoL in so many steps over the whole matrix; deterministic."""
    torch.manual_seed(0)
    mol = make_mol(components)
    queries, items = (nn.Parameter(torch.randn(number, DIM)) for number in matrix.shape)
    optimiser = torch.optim.Adam([*mol.parameters(), queries, items], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    least = 1.0
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (mol(mol.query_side(queries), mol.item_side(items)) - matrix).square().sum() / matrix.square().sum()
        loss.backward()
        optimiser.step()
        schedule.step()
        least = min(least, loss.item())
    return least


def table(fits: Sequence[Fit]) -> str:
    """Write one line per matrix."""
    heads = [f"MoL, {components**2} pairs, {num_shared(components):,} shared" for components in COMPONENTS]
    lines = [
        f"| rank | best dot product of {DIM} numbers | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for fit in fits:
        lines.append(f"| {fit.matrix} | {fit.dot_product:.4f} | {' | '.join(f'{error:.4f}' for error in fit.mol)} |")
    return "\n".join(lines)


def draw(fits: Sequence[Fit], path: Path) -> None:
    """Draw the errors by the number of pairs as an SVG or PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    pairs = [components**2 for components in COMPONENTS]
    for number, fit in enumerate(fits):
        axes.plot(pairs, fit.mol, "o-", color=f"C{number}", label=f"rank {fit.matrix}")
        axes.axhline(fit.dot_product, color=f"C{number}", linestyle=":")
    axes.set(xscale="log", xlabel="pairs of components", ylabel="error (dotted: the best dot product)")
    axes.set_xticks(pairs, [str(number) for number in pairs])
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)

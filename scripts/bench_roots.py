"""Times inverse roots by eigh and by coupled Newton for sizes and batches, and says where Newton is faster.

python scripts/bench_roots.py
python scripts/bench_roots.py --device cuda --sizes 256,1024,4096 --batches 1,16

The matrices are factors of random gradients; the default ridge of 1e-6 limits their condition number. Each
cell is the median over interleaved rounds; the error is relative to a float64 eigh.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Annotated

import torch
import typer
from bench_step import seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_soap.linalg import inverse_roots

RIDGE = 1e-6


def factors(n: int, batch: int, device: torch.device) -> Tensor:
    """Returns (batch, n, n) moving averages of GGᵀ with a spectrum over six decades, float32."""
    generator = torch.Generator(device).manual_seed(0)
    gradients = torch.randn(batch, n, 2 * n, generator=generator, device=device)
    gradients *= torch.logspace(0, -3, n, device=device)[:, None]
    return gradients @ gradients.mT / (2 * n)


def relative_error(root: Tensor, exact: Tensor) -> float:
    """Returns the largest error of a batch in the Frobenius norm."""
    return float(((root.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    sizes: Annotated[str, typer.Option(help="sizes n, split by commas")] = "64,128,256,512,1024",
    batches: Annotated[str, typer.Option(help="batch sizes, split by commas")] = "1,8",
    order: Annotated[int, typer.Option(help="p of the inverse p-th root")] = 4,
    rounds: Annotated[int, typer.Option(help="interleaved rounds; medians are shown")] = 3,
) -> None:
    """Print one row per size and batch, and the crossover."""
    place = torch.device(device)
    table = Table(title=f"(A + ridge·λI)^(-1/{order}), float32, {device}, torch {torch.__version__}")
    for heading in ("n", "batch", "eigh ms", "Newton ms", "Newton / eigh", "eigh error", "Newton error", "to eigh"):
        table.add_column(heading, justify="right")
    faster = []
    for n in map(int, sizes.split(",")):
        for batch in map(int, batches.split(",")):
            matrix = factors(n, batch, place)
            exact = inverse_roots.inverse_root(matrix.double(), exponent=-1 / order, ridge=RIDGE)
            times: dict[str, list[float]] = {"eigh": [], "newton": []}
            errors = {}
            for _ in range(rounds):
                for method, kept in times.items():
                    root = partial(inverse_roots.inverse_root, matrix, exponent=-1 / order, ridge=RIDGE, method=method)
                    kept.append(seconds(root, place))
                    errors[method] = relative_error(root(), exact)
            failed = int((~inverse_roots.coupled_newton(matrix, order=order, ridge=RIDGE)[1]).sum())
            eigh, newton = (statistics.median(times[method]) for method in ("eigh", "newton"))
            faster += [(n, batch)] if newton < eigh else []
            table.add_row(
                str(n),
                str(batch),
                f"{eigh * 1e3:.1f}",
                f"{newton * 1e3:.1f}",
                f"{newton / eigh:.2f}",
                f"{errors['eigh']:.0e}",
                f"{errors['newton']:.0e}",
                f"{failed}/{batch}",
            )
    console = Console()
    console.print(table)
    where = ", ".join(f"n={n} batch {batch}" for n, batch in faster) or "nowhere here"
    console.print(f"Coupled Newton was faster: {where}.")


if __name__ == "__main__":
    typer.run(main)

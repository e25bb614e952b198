"""Times the bare optimizer step of this package, of fused AdamW, and of other packages that are installed.

python scripts/bench_step.py                 # both sets of shapes
python scripts/bench_step.py --shapes gpt256 --rounds 5 --device cuda
python scripts/bench_step.py --shapes gpt256 --only "MARS adamw" "MARS lion" --rounds 30
python scripts/bench_step.py --scaling       # how time and bytes of SOAP grow with width and layers
python scripts/bench_step.py --shapes gpt256 --only SOAP --rounds 1 --isa avx2   # as without AVX512

Each round runs each optimizer for `--steps` steps with new random gradients, in turn, so that a slow moment of the
machine affects all of them; medians over rounds are printed. The floor is the time of the matrix products that SOAP
needs at least: 2.5 times 2mn(m+n) FLOP a step plus 6.67n³ per factor and refresh, at this machine's float32 rate.

First come the processor's name, its instructions and its rates. `--isa avx2` runs everything in a process whose
libraries use AVX2 only. On a CPU that has more, this is an emulation: its clock and caches remain.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.linalg import processor
from hf_soap.linalg.precision import float32_products

Shape = tuple[int, ...]

CPU = torch.device("cpu")

SHAPES: dict[str, list[Shape]] = {
    # GPT with 6 layers of width 256
    "gpt256": 6 * [(256, 768), (256, 256), (256, 1024), (1024, 256)] + 13 * [(256,), (256,)],
    # GPT-2 small, 2 of its layers
    "gpt2x2": 2 * [(768, 2304), (768, 768), (768, 3072), (3072, 768)] + 5 * [(768,), (768,)],
    # LoRA of rank 8 on the matrices of 24 layers of width 1024
    "lora": 24
    * [
        part
        for rows, columns in 4 * [(1024, 1024)] + [(4096, 1024), (1024, 4096)]
        for part in ((8, columns), (rows, 8))
    ],
}


ISA = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
"""Variables that restrict oneDNN, MKL and torch to a set of instructions. They are read when a process starts."""

LIGHT = ("(fused)", "adamw", "lion")
"""Last words of the names of optimizers without factors."""


def optimizers(frequency: int) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Returns constructors by name: of this package, torch's fused AdamW, and other packages that are installed."""
    # All refreshes are at their final distance, as they are after the first few hundred updates.
    soap = partial(SOAP, lr=1e-4, precondition_frequency=frequency, refresh_growth=0.0)
    found: dict[str, Callable[[list[Tensor]], Any]] = {
        "AdamW (fused)": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "SOAP": soap,
        "SOAP, staggered": partial(soap, stagger=True),
        "SOAP, bf16 rotations": partial(soap, matmul_dtype="bfloat16"),
        "SOAP, bf16 state, packed": partial(soap, state_dtype="bfloat16", pack_factors=True),
        "SOAP, one side": partial(soap, one_sided=True),
        "SOAP, one side, factorized": partial(soap, one_sided=True, factorized=True),
        "KL-SOAP": partial(soap, kl=True),
        "Shampoo": lambda params: Shampoo(params, lr=1e-4, precondition_frequency=frequency),
        **{
            f"MARS {variant}": partial(MARS, lr=1e-4, variant=variant, **options)
            for variant, options in (
                ("adamw", {}),
                ("lion", {}),
                ("shampoo", {}),
                ("soap", {"precondition_frequency": frequency, "refresh_growth": 0.0}),
            )
        },
    }
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None
        found["heavyball SOAP"] = lambda params: heavyball.SOAP(params, lr=1e-4, precondition_frequency=frequency)
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SOAP as PytorchOptimizerSOAP

        found["pytorch_optimizer SOAP"] = lambda params: PytorchOptimizerSOAP(
            params, lr=1e-4, precondition_frequency=frequency
        )
    return found


def floor_flop(shapes: list[Shape], frequency: int) -> float:
    """Returns the operations that a step of SOAP needs at least, averaged over refreshes."""
    pairs = [shape for shape in shapes if len(shape) == 2]
    return sum(2.5 * 2 * m * n * (m + n) + 6.67 * (m**3 + n**3) / frequency for m, n in pairs)


def product_rate(device: torch.device) -> float:
    """Returns the operations a second of a 1024³ product of float32 matrices with torch's default settings."""
    return rate(*(torch.randn(1024, 1024, device=device) for _ in range(2)), calls=20)


def rate(a: Tensor, b: Tensor, *, calls: int) -> float:
    """Returns the operations a second of the product of matrices (..., m, k) and (..., k, n); a quarter warms up."""
    times = [seconds(lambda: a @ b, a.device) for _ in range(calls)][calls // 4 :]
    return 2 * a.numel() * b.shape[-1] / statistics.median(times)


def rates(device: torch.device) -> dict[str, float]:
    """Returns GFLOP/s: of :func:`product_rate`, and of six products as in a step of SOAP on `gpt256`."""
    bases, blocks = (torch.randn(6, 256, columns, device=device) for columns in (256, 1024))
    found = {"float32, 1024³": product_rate(device)}
    with float32_products((256, 1024), device, sides=(0, 1)):
        found["float32, 6 × 256 × 256 × 1024"] = rate(bases, blocks, calls=20)
    found["bfloat16, 6 × 256 × 256 × 1024"] = rate(bases.bfloat16(), blocks.bfloat16(), calls=5)
    return {name: found_rate / 1e9 for name, found_rate in found.items()}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the wall time of one call, including the device's queue."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of all tensors in an optimizer's state, including nested ones."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from tensors(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)

    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(list(optimizer.state.values()))
    }
    return sum(storages.values())


def measure(
    shapes: list[Shape],
    *,
    frequency: int,
    steps: int,
    rounds: int,
    device: torch.device,
    chosen: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] | None = None,
) -> dict[str, Any]:
    """Runs all optimizers, or the chosen ones, in interleaved rounds.

    Returns:
        By optimizer: median seconds per step, worst single step of the median round, bytes of state per parameter.
    """
    generator = torch.Generator(device).manual_seed(0)
    runs: dict[str, tuple[list[Tensor], torch.optim.Optimizer]] = {}
    if chosen is None:
        chosen = optimizers(frequency)
    for name, make in chosen.items():
        params = [torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) / 16) for shape in shapes]
        runs[name] = (params, make(params))
    records: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (params, optimizer) in runs.items():
            times = []
            for _ in range(steps):
                for param in params:
                    param.grad = torch.empty_like(param) if param.grad is None else param.grad
                    param.grad.normal_(generator=generator)
                times.append(seconds(optimizer.step, device))
            records[name].append(times)
    numel = sum(p.numel() for p in next(iter(runs.values()))[0])
    result = {}
    for name, all_rounds in records.items():
        measured = sorted(all_rounds[1:], key=sum)  # the first round allocates the state and warms up
        median = measured[len(measured) // 2]
        result[name] = {
            "step_s": statistics.mean(median),
            "worst_s": max(median),
            "state_bytes_per_param": state_bytes(runs[name][1]) / numel,
        }
    return result


def scaling(widths: list[int], layers: list[int], *, frequency: int, device: torch.device) -> dict[str, Any]:
    """Measures SOAP on square matrices of growing width, and on a growing number of them.

    Returns:
        For each of the two: the sizes, seconds of a step, floor in seconds, bytes of state, and the exponents of all
        three, fitted to their logarithms by least squares.
    """
    soap, rate = {"SOAP": optimizers(frequency)["SOAP"]}, product_rate(device)
    result: dict[str, Any] = {}
    for name, cases in {
        "width": {width: 2 * [(width, width)] for width in widths},
        "layers": {count: count * [(256, 256), (256, 1024)] for count in layers},
    }.items():
        rows = []
        for shapes in cases.values():
            row = measure(shapes, frequency=frequency, steps=frequency, rounds=1, device=device, chosen=soap)["SOAP"]
            num_bytes = row["state_bytes_per_param"] * sum(math.prod(shape) for shape in shapes)
            rows.append((row["step_s"], floor_flop(shapes, frequency) / rate, num_bytes))
        sizes = list(cases)
        exponents = [exponent(sizes, [row[i] for row in rows]) for i in range(3)]
        result[name] = {"sizes": sizes, "step_s, floor_s, bytes": rows, "exponents": exponents}
    return result


def exponent(sizes: list[int], values: list[float]) -> float:
    """Returns the exponent of the power of the sizes that fits the values best."""
    logs = torch.tensor([sizes, values], dtype=torch.float64).log()
    x, y = logs - logs.mean(1, keepdim=True)
    return float((x * y).sum() / (x * x).sum())


def print_scaling(result: dict[str, Any], console: Console) -> None:
    """Prints a table for each quantity that grows."""
    for name, found in result.items():
        table = Table(title=f"SOAP against {name}")
        for heading in (name, "ms/step", "floor ms", "× floor", "state MiB"):
            table.add_column(heading, justify="right")
        for size, (step, floor, num_bytes) in zip(found["sizes"], found["step_s, floor_s, bytes"], strict=True):
            table.add_row(
                str(size), f"{step * 1e3:.1f}", f"{floor * 1e3:.1f}", f"{step / floor:.2f}", f"{num_bytes / 2**20:.1f}"
            )
        step, floor, num_bytes = (f"{name}^{value:.2f}" for value in found["exponents"])
        table.add_row("grows as", step, floor, "", num_bytes, style="bold")
        console.print(table)


def main() -> None:
    """Prints one table per set of shapes, and writes all figures as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--scaling", action="store_true", help="measure growth with width and layers instead")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 48])
    parser.add_argument("--frequency", type=int, default=10, help="steps between two refreshes")
    parser.add_argument("--steps", type=int, default=10, help="steps per round; a multiple of the frequency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--isa", choices=[*ISA], help="instructions that the libraries may use, in a child process")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names; AdamW is always included")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    restricted = {**os.environ, **ISA.get(args.isa, {})}
    if restricted != dict(os.environ):
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=restricted, check=False).returncode)
    device = torch.device(args.device)
    console = Console()
    report: dict[str, Any] = {
        "machine": processor.name(device),
        "instructions": processor.instructions(device),
        "emulated": args.isa,
        "gflop_per_s": rates(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    instructions = report["instructions"] + (" emulated" if args.isa else "")
    console.print(f"{report['machine']}, {instructions}, threads: {report['threads']}")
    for name, value in report["gflop_per_s"].items():
        console.print(f"{name}: {value:.1f} GFLOP/s")
    if args.scaling:
        report |= scaling(args.widths, args.layers, frequency=args.frequency, device=device)
        print_scaling({name: report[name] for name in ("width", "layers")}, console)
    for name in [] if args.scaling else SHAPES if args.shapes == "all" else [args.shapes]:
        shapes = SHAPES[name]
        floor = floor_flop(shapes, args.frequency) / product_rate(device)
        chosen = optimizers(args.frequency)
        if name == "lora":  # a factor on the longer side would take gigabytes
            chosen = {key: make for key, make in chosen.items() if "one side" in key or key.split()[-1] in LIGHT}
        only = ("AdamW", *args.only)
        chosen = {key: make for key, make in chosen.items() if key.startswith(only)}
        result = measure(
            shapes, frequency=args.frequency, steps=args.steps, rounds=args.rounds, device=device, chosen=chosen
        )
        report[name] = {"floor_s": floor, **result}
        title = f"{name}: floor {floor * 1e3:.1f} ms, frequency {args.frequency}, torch {torch.__version__}"
        table = Table(title=f"{title}, {instructions}")
        for heading in ("optimizer", "ms/step", "× floor", "× AdamW", "worst step / mean", "state bytes/param"):
            table.add_column(heading, justify="left" if heading == "optimizer" else "right")
        adamw = result["AdamW (fused)"]["step_s"]
        for label, row in result.items():
            step = row["step_s"]
            worst, num_bytes = f"{row['worst_s'] / step:.1f}", f"{row['state_bytes_per_param']:.1f}"
            table.add_row(label, f"{step * 1e3:.1f}", f"{step / floor:.2f}", f"{step / adamw:.1f}", worst, num_bytes)
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

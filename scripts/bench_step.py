"""Times the bare optimizer step of the family beside fused AdamW and those peers that are installed.

python scripts/bench_step.py                 # both sets of shapes
python scripts/bench_step.py --shapes gpt256 --rounds 5 --device cuda

Every round runs each optimizer for `--steps` steps with fresh random gradients, in turn, so that a slow moment of the
machine hits all alike; medians over rounds are printed. The floor is the time of the matrix products that SOAP cannot
do without, 2.5 units of 2mn(m+n) FLOP a step plus 6.67n³ per factor and refresh, at the machine's own float32 rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
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

Shape = tuple[int, ...]

SHAPES: dict[str, list[Shape]] = {
    # GPT with 6 layers of width 256
    "gpt256": 6 * [(256, 768), (256, 256), (256, 1024), (1024, 256)] + 13 * [(256,), (256,)],
    # GPT-2 small, 2 of its layers
    "gpt2x2": 2 * [(768, 2304), (768, 768), (768, 3072), (3072, 768)] + 5 * [(768,), (768,)],
}


def optimizers(frequency: int) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Returns constructors by name: those of this package, torch's fused AdamW and the peers that are installed."""
    found: dict[str, Callable[[list[Tensor]], Any]] = {
        "AdamW (fused)": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "SOAP": lambda params: SOAP(params, lr=1e-4, precondition_frequency=frequency),
        "SOAP, staggered": lambda params: SOAP(params, lr=1e-4, precondition_frequency=frequency, stagger=True),
        "SOAP, one side": lambda params: SOAP(params, lr=1e-4, precondition_frequency=frequency, one_sided=True),
        "SOAP, one side, factorized": lambda params: SOAP(
            params, lr=1e-4, precondition_frequency=frequency, one_sided=True, factorized=True
        ),
        "KL-SOAP": lambda params: SOAP(params, lr=1e-4, precondition_frequency=frequency, kl=True),
        "Shampoo": lambda params: Shampoo(params, lr=1e-4, precondition_frequency=frequency),
        **{
            f"MARS {variant}": partial(MARS, lr=1e-4, variant=variant, precondition_frequency=frequency)
            for variant in ("adamw", "lion", "shampoo", "soap")
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


def floor_seconds(shapes: list[Shape], frequency: int, device: torch.device) -> float:
    """Returns the time of SOAP's unavoidable products per step, at the measured float32 rate of a 1024³ product."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(20)]
    rate = 2 * 1024**3 / statistics.median(times[5:])
    flop = 0.0
    for m, n in (shape for shape in shapes if len(shape) == 2):
        flop += 2.5 * 2 * m * n * (m + n) + 6.67 * (m**3 + n**3) / frequency
    return flop / rate


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the wall time of one call, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of all tensors that an optimizer keeps, nested ones too."""

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


def measure(shapes: list[Shape], *, frequency: int, steps: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Runs all optimizers in interleaved rounds.

    Returns:
        By optimizer: median seconds per step, worst single step of the median round, bytes of state per parameter.
    """
    generator = torch.Generator(device).manual_seed(0)
    runs: dict[str, tuple[list[Tensor], torch.optim.Optimizer]] = {}
    for name, make in optimizers(frequency).items():
        params = [torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) / 16) for shape in shapes]
        runs[name] = (params, make(params))
    records: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (params, optimizer) in runs.items():
            times = []
            for _ in range(steps):
                for param in params:
                    param.grad = torch.randn(param.shape, device=device, generator=generator)
                times.append(seconds(optimizer.step, device))
            records[name].append(times)
    numel = sum(p.numel() for p in next(iter(runs.values()))[0])
    result = {}
    for name, all_rounds in records.items():
        measured = sorted(all_rounds[1:], key=sum)  # the first round makes the state and warms up
        median = measured[len(measured) // 2]
        result[name] = {
            "step_s": statistics.mean(median),
            "worst_s": max(median),
            "state_bytes_per_param": state_bytes(runs[name][1]) / numel,
        }
    return result


def main() -> None:
    """Prints one table per set of shapes and writes all figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--frequency", type=int, default=10, help="steps between two refreshes")
    parser.add_argument("--steps", type=int, default=10, help="steps a round; a multiple of the frequency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    device = torch.device(args.device)
    console = Console()
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in SHAPES if args.shapes == "all" else [args.shapes]:
        shapes = SHAPES[name]
        floor = floor_seconds(shapes, args.frequency, device)
        result = measure(shapes, frequency=args.frequency, steps=args.steps, rounds=args.rounds, device=device)
        report[name] = {"floor_s": floor, **result}
        table = Table(
            title=f"{name}: floor {floor * 1e3:.1f} ms, frequency {args.frequency}, torch {torch.__version__}"
        )
        for heading in ("optimizer", "ms/step", "× floor", "× AdamW", "worst step / mean", "state bytes/param"):
            table.add_column(heading, justify="left" if heading == "optimizer" else "right")
        adamw = result["AdamW (fused)"]["step_s"]
        for label, row in result.items():
            step = row["step_s"]
            worst, octets = f"{row['worst_s'] / step:.1f}", f"{row['state_bytes_per_param']:.1f}"
            table.add_row(label, f"{step * 1e3:.1f}", f"{step / floor:.2f}", f"{step / adamw:.1f}", worst, octets)
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

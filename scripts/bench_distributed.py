"""Measures the modes for several ranks on this machine, and estimates their cost on more ranks.

    python scripts/bench_distributed.py                  # gloo processes on the CPU, then the projection
    python scripts/bench_distributed.py --no-measure     # the projection alone

Processes on one machine share its cores: the step of three is no faster than that of one, and the times show the cost
of communication, not its benefit. Bytes are those that a rank passes to collectives, counted at the calls.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.planning import costs

Shape = tuple[int, ...]

OPTIMIZERS: dict[str, type[BlockOptimizer]] = {"SOAP": SOAP, "Shampoo": Shampoo, "MARS": MARS}

MEASURED: list[Shape] = 4 * [(256, 768), (256, 256), (256, 1024), (1024, 256)] + 8 * [(256,)]
"""A GPT with 4 layers of width 256."""


def llama(hidden: int, inner: int, layers: int, key_value: int) -> list[Shape]:
    """Returns the shapes of the matrices and vectors of a Llama 3."""
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    block = [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(128256, hidden), (128256, hidden), (hidden,), *(layers * block)]


PROJECTED = {
    "Llama 3 8B": llama(4096, 14336, 32, 1024),
    "Llama 3 70B": llama(8192, 28672, 80, 1024),
}


def make(shapes: list[Shape], mode: str, name: str) -> tuple[list[nn.Parameter], BlockOptimizer]:
    """Returns parameters in the given mode, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) / 16) for shape in shapes]
    if mode in ("local", "owner"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])) for param in params]
    optimizer = OPTIMIZERS[name](params)
    for group in optimizer.param_groups:
        group["shard_mode"] = "owner" if "owner" in mode else "local"
        group["distributed_refresh"] = mode == "ddp"
    return params, optimizer


class Counter:
    """Counts the bytes that this rank passes to the collectives of a step, except those for itself."""

    def __init__(self) -> None:
        self.bytes = 0
        exchange, broadcast = dist.all_to_all_single, dist.broadcast

        def counted_exchange(out: Tensor, given: Tensor, received: Any, sent: list[int], **options: Any) -> Any:
            self.bytes += (given.numel() - sent[dist.get_rank()]) * given.element_size()
            return exchange(out, given, received, sent, **options)

        def counted_broadcast(given: Tensor, src: int, **options: Any) -> Any:
            if src == dist.get_rank():
                self.bytes += given.numel() * given.element_size() * (dist.get_world_size() - 1)
            return broadcast(given, src=src, **options)

        dist.all_to_all_single, dist.broadcast = counted_exchange, counted_broadcast


def worker(rank: int, ranks: int, port: int, name: str, steps: int, rounds: int, results: Any) -> None:
    """Measures all modes in turn."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    counter = Counter()
    runs = {mode: make(MEASURED, mode, name) for mode in ("local", "owner", "ddp", "ddp, owner")}
    times: dict[str, list[float]] = {mode: [] for mode in runs}
    sent = dict.fromkeys(runs, 0)
    generator = torch.Generator().manual_seed(1)
    for number in range(rounds + 1):
        for mode, (params, optimizer) in runs.items():
            for _ in range(steps):
                for param in params:
                    grad = torch.randn(param.shape, generator=generator)
                    sharded = hasattr(param, "device_mesh")
                    param.grad = distribute_tensor(grad, param.device_mesh, [Shard(0)]) if sharded else grad
                dist.barrier()
                before, start = counter.bytes, time.perf_counter()
                optimizer.step()
                dist.barrier()
                if number:  # the first round allocates the state
                    times[mode].append(time.perf_counter() - start)
                    sent[mode] += counter.bytes - before
    mine = {
        mode: (statistics.mean(times[mode]), sent[mode] / (rounds * steps), optimizer.state_bytes())
        for mode, (_, optimizer) in runs.items()
    }
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine)
    if rank == 0:
        results.append(every)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort at a regular exit


def measure(console: Console, name: str, ranks: int, steps: int, rounds: int) -> None:
    """Prints the cost of each mode on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.list()
        mp.spawn(worker, (ranks, port, name, steps, rounds, results), nprocs=ranks)
        (every,) = results
    table = Table(title=f"{name}, {ranks} processes, {sum(torch.Size(s).numel() for s in MEASURED):,} parameters")
    for heading in ("mode", "ms / step", "sent MiB / step and rank", "state MiB / rank"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode in every[0]:
        seconds = max(rank[mode][0] for rank in every)
        sent = statistics.mean(rank[mode][1] for rank in every)
        state = max(rank[mode][2] for rank in every)
        table.add_row(mode, f"{seconds * 1e3:.0f}", f"{sent / 2**20:.2f}", f"{state / 2**20:.1f}")
    console.print(table)


def project(console: Console, name: str) -> None:
    """Prints the estimated cost per rank of each mode, for large models and numbers of ranks."""
    table = Table(title=f"{name}, projected")
    for heading in ("model", "ranks", "mode", "state GiB / rank", "sent GiB / step and rank", "TFLOP / step and rank"):
        table.add_column(heading, justify="right" if "/" in heading or heading == "ranks" else "left")
    for model, shapes in PROJECTED.items():
        optimizer = OPTIMIZERS[name]([nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes])
        for ranks in (8, 64, 512):
            for mode in ("local", "owner"):
                cost = costs.cost(optimizer, ranks=ranks, mode=mode)
                row = f"{cost.state / 2**30:.2f}", f"{cost.sent / 2**30:.2f}", f"{cost.work / 1e12:.2f}"
                table.add_row(model, str(ranks), mode, *row)
    console.print(table)


def main(
    optimizer: Annotated[str, typer.Option(help="SOAP, Shampoo or MARS")] = "SOAP",
    processes: Annotated[list[int] | None, typer.Option(help="numbers of processes", show_default="2 3")] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps per round; a multiple of the frequency of 10")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    measured: Annotated[bool, typer.Option("--measure/--no-measure", help="on this machine")] = True,
) -> None:
    """Print the tables."""
    console = Console(width=120)
    for ranks in (processes or [2, 3]) if measured else []:
        measure(console, optimizer, ranks, steps, rounds)
    project(console, optimizer)


if __name__ == "__main__":
    typer.run(main)

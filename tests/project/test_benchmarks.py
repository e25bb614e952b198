"""The benchmarks run, and what they count is right; nobody asserts a time."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import bench_async
import bench_distributed
import bench_metrics
import bench_roots
import bench_step
import pytest
import torch
import typer
from paths import PYTHONPATH, ROOT
from rich.console import Console
from typer.testing import CliRunner

from hf_soap.__main__ import app


def test_bench_step_counts_state_and_times_each_optimizer() -> None:
    shapes = [(8, 6), (8, 6), (5,)]
    result = bench_step.measure(shapes, frequency=2, steps=2, rounds=1, device=torch.device("cpu"))
    assert {"AdamW (fused)", "SOAP", "Shampoo", "MARS adamw"} <= result.keys()
    numel = 2 * 48 + 5
    moments, factors = 2 * numel * 4, 2 * 2 * (64 + 36) * 4
    assert result["AdamW (fused)"]["state_bytes_per_param"] * numel == pytest.approx(moments + 3 * 4)
    assert result["SOAP"]["state_bytes_per_param"] * numel == pytest.approx(moments + factors + 3 * 8)
    assert all(row["worst_s"] >= row["step_s"] > 0 for row in result.values())
    assert bench_step.floor_flop([(10, 20), (5,)], 2) == 5 * 200 * 30 + 6.67 * (1000 + 8000) / 2
    rates = bench_step.rates(torch.device("cpu"))
    assert len(rates) == 3
    assert min(rates.values()) > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has no AVX2")
def test_bench_step_emulates_avx2(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = shlex.split(f"--shapes gpt256 --only 'MARS lion' --rounds 1 --steps 1 --isa avx2 --json {file}")
    command = [sys.executable, ROOT / "scripts" / "bench_step.py", *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, check=True)
    assert b"AVX2 emulated" in done.stdout
    found = json.loads(file.read_text())
    assert (found["instructions"], found["emulated"]) == ("AVX2", "avx2")
    assert found["machine"]
    assert len(found["gflop_per_s"]) == 3
    assert min(found["gflop_per_s"].values()) > 0


def test_scaling_fits_exponents() -> None:
    assert bench_step.exponent([2, 4, 8], [3 * 2**2.5, 3 * 4**2.5, 3 * 8**2.5]) == pytest.approx(2.5)
    result = bench_step.scaling([8, 16], [1, 2], frequency=2, device=torch.device("cpu"))
    assert result["width"]["exponents"][2] == pytest.approx(2, abs=0.01)  # bytes
    assert result["layers"]["exponents"][2] == pytest.approx(1, abs=0.01)
    assert result["layers"]["exponents"][1] == pytest.approx(1)
    assert result["width"]["exponents"][1] == pytest.approx(3)
    bench_step.print_scaling(result, Console())


def test_bench_metrics_measures_pairs_of_steps() -> None:
    makers = bench_step.optimizers(2)
    device = torch.device("cpu")
    found = bench_metrics.measure(makers["SOAP"], [(8, 6), (5,)], steps=8, device=device)
    assert found is not None
    assert found[0] > 0
    assert bench_metrics.measure(makers["AdamW (fused)"], [(8, 6)], steps=8, device=device) is None


def test_bench_roots_prints_a_row_per_size_and_batch() -> None:
    app = typer.Typer()
    app.command()(bench_roots.main)
    done = CliRunner().invoke(app, ["--sizes", "8,12", "--batches", "1,2", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert sum("/" in line.split("│")[-2] for line in done.output.splitlines() if "│" in line) == 4


@pytest.mark.slow
def test_bench_async_trains_the_three_runs_alike_until_roots_differ() -> None:
    app = typer.Typer()
    app.command()(bench_async.main)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["--steps", "6", "--frequency", "3", "--width", "8", "--layers", "1"]
    )
    assert done.exit_code == 0, done.output
    losses = [float(line.split("│")[2]) for line in done.output.splitlines() if line.count("│") == 6]
    assert len(losses) == 3
    assert len(set(losses)) == 1, "before the start step the roots of all three are unused"


def test_options_command() -> None:
    done = CliRunner().invoke(app, ["options", "mars_lion", "--markdown"])
    assert done.exit_code == 0
    assert "| `gamma` | float, >= 0 | `0.025` |" in done.output
    wrong = CliRunner().invoke(app, ["options", "sopa"])
    assert wrong.exit_code == 2
    assert "did you mean soap?" in wrong.output


def test_bench_distributed_projects(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_distributed, "PROJECTED", {"a small one": bench_distributed.llama(64, 128, 2, 16)})
    bench_distributed.project(Console(width=120), "MARS")
    printed = capsys.readouterr().out
    assert printed.count("a small one") == 6
    assert {"local", "owner"} <= set(printed.split())


@pytest.mark.slow
def test_bench_distributed_measures_every_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bench_distributed.measure(Console(width=120), "SOAP", 2, 10, 1)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.count("│") == 5]
    sent = {row[1].strip(): float(row[3]) for row in rows}
    assert sent["local"] == 0
    assert min(sent["owner"], sent["ddp"], sent["ddp, owner"]) > 0

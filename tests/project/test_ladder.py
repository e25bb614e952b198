"""The ladder: its search for the length of a run, its results from known curves, and a tiny one that is killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ladder
import pytest
import update_readme
from _ladder_runs import Runs
from _ladder_search import RATIO, UNIT, search, steps_to
from _ladder_table import ladder_table
from comparing import SETTINGS, ends_with
from paths import PYTHONPATH, ROOT

from hf_soap.cli.compare.results import RunLog, RunResult, RunSettings

STEPS = 600


def logarithmic(crossing: float, slope: float) -> Callable[[float], float]:
    return lambda steps: 2 - slope * math.log(steps / crossing)


@pytest.mark.parametrize("start", [60, 240, 300, 600])
@pytest.mark.parametrize("slope", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("crossing", [50, 239, 306, 590])
def test_the_search_encloses_the_crossing_in_few_runs(start: int, slope: float, crossing: float) -> None:
    tried: list[int] = []

    def loss(steps: int) -> float:
        tried.append(steps)
        return logarithmic(crossing, slope)(steps)

    short, long = search(start, loss, 2.0, STEPS)
    assert loss(short) > 2 >= loss(long)
    assert long <= RATIO * short or long - short == UNIT
    made = tried[:-2]
    assert len(made) == len(set(made)) <= 7
    assert max(made) <= STEPS
    assert all(steps % UNIT == 0 for steps in made)


def test_the_search_says_that_the_longest_run_does_not_reach_the_target() -> None:
    assert search(300, logarithmic(601, 0.3), 2.0, STEPS) == [STEPS]
    assert search(300, lambda steps: math.inf, 2.0, STEPS) == [STEPS]
    assert search(300, logarithmic(600, 0.3), 2.0, STEPS)[1] == STEPS


def test_the_search_ends_at_the_shortest_run() -> None:
    assert search(300, lambda steps: 1.0, 2.0, STEPS) == [UNIT]


@pytest.mark.parametrize("seed", range(20))
def test_the_search_ends_on_a_noisy_curve(seed: int) -> None:
    def loss(steps: int) -> float:
        return logarithmic(250, 0.3)(steps) + random.Random(f"{seed} {steps}").gauss(0, 0.05)

    lengths = search(300, loss, 2.0, STEPS)
    assert lengths == [STEPS] or loss(lengths[0]) > 2 >= loss(lengths[1])


def test_steps_are_interpolated_for_each_seed() -> None:
    curves = [logarithmic(crossing, 0.3) for crossing in (230, 250, 275)]
    losses = {steps: [curve(steps) for curve in curves] for steps in (240, 264)}
    assert steps_to(losses, 2.0) == pytest.approx([230, 250, 275])
    assert steps_to({STEPS: [2.1, 2.2]}, 2.0) == [STEPS]


class Known:
    """Runs whose final loss is a function of their settings."""

    def __init__(self) -> None:
        self.made: set[RunSettings] = set()

    def start(self, settings: RunSettings) -> Future[RunResult]:
        self.made.add(settings)
        best, crossing = {"": (0.02, 600), "fast": (0.04, 250), "slow": (0.01, 700)}[settings.optim_args]
        worse = 0.1 * abs(math.log2(settings.lr / best))
        future: Future[RunResult] = Future()
        future.set_result(ends_with(settings, logarithmic(crossing, 0.3)(settings.steps) + worse))
        return future

    def __call__(self, settings: RunSettings) -> RunResult:
        return self.start(settings).result()


RUNGS = {
    "AdamW": ladder.Rung("adamw_torch_fused", lr=1e-2, guess=1),
    "fast": ladder.Rung("soap", "fast"),
    "slow": ladder.Rung("soap", "slow"),
}
BASE = replace(SETTINGS, steps=STEPS)


def test_results_of_known_curves() -> None:
    runs = Known()
    found = ladder.ladder(RUNGS, BASE, runs, workers=2, seeds=2, at=240)
    assert found["AdamW"]["target"] == pytest.approx(2)
    assert {name: rung["lr"] for name, rung in found.items()} == {"AdamW": 0.02, "fast": 0.04, "slow": 0.01}
    assert {rung["edge"] for rung in found.values()} == {None}
    assert found["fast"]["steps"]["by_seed"] == pytest.approx([250, 250])
    assert found["fast"]["percent"]["mean"] == pytest.approx(100 * 250 / 600)
    assert found["fast"]["loss_at"]["mean"] == pytest.approx(logarithmic(250, 0.3)(240))
    assert (found["fast"]["reached"], found["slow"]["reached"]) == (True, False)
    assert {run.adam_beta2 for run in runs.made if run.optimizer == "soap"} == {0.999}
    assert {(run.adam_beta1, run.adam_beta2) for run in runs.made if run.optimizer != "soap"} == {(0.9, 0.95)}
    assert max(run.steps for run in runs.made) == STEPS


def report(found: dict[str, Any], log: RunLog) -> dict[str, Any]:
    for name, rung in RUNGS.items():
        found[name] |= {kind: ladder.costs(ladder.settings_of(rung, BASE), log) for kind in ("cost", "time")}
    settings = {"layers": 1, "width": 16, "steps": STEPS, "seeds": 2, "at": 240, "text": "letters"}
    made_with = [{"processor": "a CPU", "threads": 1, "commit": commit} for commit in ("abc", "def")]
    target = found["AdamW"].get("target")
    return settings | {"versions": {"torch": "2"}, "target": target, "made_with": made_with, "rungs": found}


def test_the_table_has_what_is_known_and_no_more(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl", {})
    options = {"seeds": 2, "at": 240}
    empty = ladder_table(report(ladder.ladder(RUNGS, BASE, Runs(log, None), **options), log))
    assert "| fast |" not in empty

    known = Known()
    ladder.ladder(RUNGS, BASE, known, **options)
    for settings in known.made:
        log.add(known(settings))
    again = RunLog(tmp_path / "runs.jsonl", {})
    whole = report(ladder.ladder(RUNGS, BASE, Runs(again, None), **options), again)
    (tmp_path / "ladder.json").write_text(json.dumps(whole))
    page = update_readme.with_ladders("<!-- ladder -->\nold\n<!-- end -->\n", [tmp_path / "ladder.json"])
    assert page == f"<!-- ladder -->\n{ladder_table(whole)}<!-- end -->\n"
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in page.splitlines() if line.startswith("| ")}
    assert rows["| AdamW"][4:7] == ["600", "100.0", ""]
    assert rows["| fast"][:7] == ["`fast`", "0.04", "2.0122", "0.0000", "250", "41.7", "0.0"]
    assert rows["| slow"][4:7] == ["> 600", "> 100.0", ""]
    assert "commits: abc, def" in page


def test_the_table_of_the_script_is_accepted_by_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=20_000)))
    for rung in ladder.RUNGS.values():
        settings = ladder.settings_of(rung, BASE)
        assert settings.steps % UNIT == 0
        ladder.check_settings(settings, ladder.text(tmp_path / "text.txt"))


def start(out: Path, data: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "ladder.py"), "--out", str(out), "--data", str(data)]
    command += ["--rungs", "SOAP, official", "--workers", "2", "--seeds", "2", "--layers", "1", "--width", "16"]
    command += ["--steps", "24", "--at", "6"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        [*command, "--steps", "24", "--at", "6"], env=environment, stdout=subprocess.PIPE, text=True
    )


def results(out: Path) -> dict[str, Any]:
    """The report without seconds, which no two runs share."""
    found = json.loads((out / "ladder.json").read_text())
    for rung in found["rungs"].values():
        del rung["cost"]["ms"], rung["cost"]["optimizer_ms"]
    return found  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_killed_ladder_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.mkdir()
    (data / "words.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=20_000)))
    log = tmp_path / "killed" / "runs.jsonl"
    process = start(tmp_path / "killed", data)
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the output ends with the last process that holds it: no worker is left
    kept = log.read_text()
    log.write_text(kept + '{"conditions": {"da')
    for name in ("killed", "whole"):
        done = start(tmp_path / name, data)
        done.communicate(timeout=600)
        assert done.returncode == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert log.read_text().startswith(kept)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}}")]
    settings = [json.dumps(line["run"]["settings"]) for line in lines]
    assert len(settings) == len(set(settings))
    assert len(lines) == sum(rung["cost"]["runs"] for rung in results(tmp_path / "whole")["rungs"].values())

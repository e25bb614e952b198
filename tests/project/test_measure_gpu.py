"""The script that measures on a GPU, rehearsed on a CPU: whole, cut, and turned into tables."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "measure_gpu.py"
STAGES = ["tests", "steps", "timing", "profile", "kernels", "train"]
sys.path.insert(0, str(ROOT / "scripts"))

import measure_gpu  # noqa: E402
from _gpu_tables import gpu_tables  # noqa: E402


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rehearsal")
    said, _ = start(out).communicate(timeout=600)
    assert said.splitlines() == [f"{stage}: done" for stage in STAGES]
    return json.loads((out / "gpu.json").read_text())  # type: ignore[no-any-return]


def test_a_rehearsal_runs_every_stage(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["status"] == dict.fromkeys(STAGES, "done")
    assert rehearsal["machine"]["rehearsal"] is True
    assert "skipped" in rehearsal["tests"]["summary"]
    failed = [
        (stage, name, found) for stage in STAGES for name, found in rehearsal[stage].items() if "failed" in str(found)
    ]
    assert not [entry for entry in failed if entry[0] != "tests"]
    assert any(name.endswith("SOAP, f=1") and row["ms"] > 0 for name, row in rehearsal["steps"].items())
    assert {"AdamW (fused)", "SOAP f=10"} <= rehearsal["timing"].keys()
    assert all(row["operators"] > 0 for row in rehearsal["profile"].values())
    assert any("fastest" in row for row in rehearsal["kernels"].values())
    assert any(row.get("final_eval_loss", 0) > 0 for row in rehearsal["train"].values())


def test_tables_are_marked_as_a_rehearsal(rehearsal: dict[str, Any]) -> None:
    text = gpu_tables(rehearsal)
    assert text.startswith("**A rehearsal on a CPU")
    assert text.count("| ---") >= 5
    rehearsal = {**rehearsal, "machine": {**rehearsal["machine"], "rehearsal": False}}
    assert "rehearsal" not in gpu_tables(rehearsal)


def test_peers_need_no_installation(tmp_path: Path) -> None:
    """A wheel, and the file of SOAP's authors: both stand-ins that only look like SOAP."""
    peers = tmp_path / "peers"
    peers.mkdir()
    stand_in = "import torch\nclass SOAP(torch.optim.SGD):\n"
    stand_in += (
        "    def __init__(self, params, lr, precondition_frequency):\n        super().__init__(params, lr=lr)\n"
    )
    (peers / "soap.py").write_text(stand_in)
    with zipfile.ZipFile(peers / "pytorch_optimizer-9.8.7-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pytorch_optimizer/__init__.py", stand_in)
    start(tmp_path / "out", "--stages", "steps", "--peers", str(peers)).communicate(timeout=300)
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["machine"]["versions"]["pytorch_optimizer"] == "9.8.7"
    for name in ("official SOAP, f=1", "official SOAP, f=2", "pytorch_optimizer SOAP, f=1"):
        assert found["steps"][f"tiny: {name}"]["ms"] > 0


def test_a_cut_leaves_the_figures_whole(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    process = start(tmp_path, "--stages", "steps", "kernels")
    time.sleep(random.Random(seed).uniform(4, 12))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (tmp_path / "gpu.json").exists():  # it may have been cut before the first figure
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["machine"]["rehearsal"] is True, f"cut with seed {seed}"
        assert set(found.get("status", {}).values()) <= {"started", "done"}, f"cut with seed {seed}"


def test_the_budgets_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--list"])
    measure_gpu.main()
    *stages, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in stages] == STAGES
    assert sum(float(line.split()[1]) for line in stages) == float(total.split()[1]) == 25

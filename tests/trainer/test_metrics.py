"""What the log says of an optimizer, against what weights and state say themselves."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from helpers import parameters, train
from torch import nn
from transformers import Trainer

from hf_soap import MARS, SOAP, Shampoo, SoapMetricsCallback, SoapTrainer
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.profiling import RecordingMetrics, StepProfiler, Stopwatch
from hf_soap.linalg import eigenbases
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.soap import SoapRule
from hf_soap.rules.storage import decoded
from hf_soap.trainer.metrics import diagnostics, measurements, plans_of, slug

Make = Callable[[Any], BlockOptimizer]

OPTIMIZERS: dict[str, Make] = {
    "soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2),
    "soap, current included": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, include_current=True),
    "soap, one side, factorized": lambda p: SOAP(
        p, lr=1e-2, precondition_frequency=2, one_sided=True, factorized=True
    ),
    "soap, staggered, blocks": lambda p: SOAP(p, lr=1e-2, precondition_frequency=3, stagger=True, block_size=4),
    "soap, rounded": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, state_dtype="bfloat16", pack_factors=True),
    "kl_soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, kl=True),
    "shampoo": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, start_step=2),
    "kl_shampoo": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, kl=True, graft=None),
    "shampoo, late roots": lambda p: Shampoo(
        p, lr=1e-2, precondition_frequency=3, start_step=2, asynchronous=True, delay=2
    ),
    "shampoo, background": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, asynchronous=True),
    "mars": lambda p: MARS(p, lr=1e-2),
    "mars_lion": lambda p: MARS(p, lr=1e-2, variant="lion"),
    "mars_shampoo": lambda p: MARS(p, lr=1e-2, variant="shampoo"),
    "mars_soap": lambda p: MARS(p, lr=1e-2, variant="soap", precondition_frequency=2),
}


def probed(make: Make, params: Any) -> tuple[BlockOptimizer, StepProfiler]:
    optimizer = make(params)
    optimizer.profiler = StepProfiler()
    return optimizer, optimizer.profiler


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_the_change_of_the_weights(name: str, dtype: torch.dtype) -> None:
    """Of each rule, whichever kernels take its step, with weight decay and what bf16 rounds away."""
    params = parameters(dtype=dtype)
    optimizer, profiler = probed(OPTIMIZERS[name], params)
    train(optimizer, params, range(4))
    measurements(optimizer)
    before = [param.detach().clone().double() for param in params]
    profiler.due = True
    train(optimizer, params, range(4, 5))
    found = measurements(optimizer)
    rules = {param: plan.label for param, plan in plans_of(optimizer).items()}
    assert len(rules) == len(params) - 1, "one has no entries"
    for rule in set(rules.values()):
        pairs = zip(params, before, strict=True)
        own = [(old, param.detach().double()) for param, old in pairs if rules.get(param) == rule]
        moved = sum(float((new - old).square().sum()) for old, new in own)
        length = sum(float(old.square().sum()) for old, _ in own)
        entries = sum(old.numel() for old, _ in own)
        exact = 1e-10 if dtype == torch.float64 else 1e-2
        assert moved > 0
        assert found[f"optimizer/update_rms/{slug(rule)}"] == pytest.approx(math.sqrt(moved / entries), rel=exact)
        assert found[f"optimizer/update_ratio/{slug(rule)}"] == pytest.approx(math.sqrt(moved / length), rel=exact)


@pytest.mark.parametrize("name", ["soap", "soap, rounded", "soap, staggered, blocks", "mars_soap"])
def test_the_off_diagonal_share_is_that_of_the_factors(name: str) -> None:
    params = parameters()
    optimizer, _ = probed(OPTIMIZERS[name], params)
    train(optimizer, params, range(6))
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for param, plan in plans_of(optimizer).items():
        for role, factors in decoded(optimizer.state[param], plan.state_spec, torch.float32).items():
            for factor in factors.double() if role.startswith("factor") else []:
                shares[plan.label].append(float((factor - factor.diag().diag()).norm() / factor.norm()))
    found = measurements(optimizer)
    assert len(shares) == 2, "matrices, and a tensor of three dimensions"
    for rule, own in shares.items():
        assert found[f"optimizer/factor_off_diagonal/{slug(rule)}"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    everything = [share for own in shares.values() for share in own]
    assert 0 < found["optimizer/factor_off_diagonal"] < 1
    assert found["optimizer/factor_off_diagonal"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    assert diagnostics(optimizer)["optimizer/factor_off_diagonal"] == found["optimizer/factor_off_diagonal"]


def recording() -> RecordingMetrics:
    return RecordingMetrics(StepProfiler())


@pytest.mark.parametrize("degrees", [0.1, 5.0, 40.0])
def test_a_known_rotation_has_its_angle(degrees: float) -> None:
    """QR of a symmetric 2 x 2 matrix turns both vectors by the angle of its first column."""
    angle = math.radians(degrees)
    factor = torch.tensor([[[3.0, 3.0 * math.tan(angle)], [3.0 * math.tan(angle), 5.0]]], dtype=torch.float64)
    rotation, refreshed = eigenbases.refresh(factor)
    one = recording()
    one.rotated(rotation, refreshed.abs())
    sums = one.take()
    assert math.degrees(sums["rotation"]) == pytest.approx(degrees, rel=1e-6)
    assert sums["rotations"] == 1


def test_neither_signs_nor_the_null_space_count_as_rotation() -> None:
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    rotation = torch.block_diag(torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)), turned)
    one = recording()
    one.rotated(rotation[None], torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64))[None])
    assert one.take()["rotation"] == 0


def test_vectors_that_change_places_have_not_turned() -> None:
    state = {
        "factor_0": torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))[None],
        "basis_0": torch.eye(3, dtype=torch.float64)[None],
        "exp_avg": torch.ones(1, 3, 2, dtype=torch.float64),
        "exp_avg_sq": torch.ones(1, 3, 2, dtype=torch.float64),
    }
    rule = SoapRule(beta1=0.9, beta2=0.9, shampoo_beta=0.9, eps=1e-8, precondition_frequency=1)
    one = recording()
    rule._refresh(state, StepContext(Layout((3, 2), (1, 1), (3, 2), (0,)), (1,), (0,), metrics=one))
    assert state["factor_0"][0].diagonal().tolist() == [5.0, 3.0, 1.0]
    sums = one.take()
    assert (sums["rotation"], sums["rotations"]) == (0.0, 1.0)


def test_the_angle_is_that_between_old_and_new_bases() -> None:
    params = parameters([(6, 6)], torch.float64)
    optimizer, _ = probed(lambda p: SOAP(p, lr=1e-2, precondition_frequency=1), params)
    train(optimizer, params, range(5))
    measurements(optimizer)
    state = optimizer.state[params[0]]
    before = {side: state[f"basis_{side}"][0].clone() for side in (0, 1)}
    train(optimizer, params, range(5, 6))
    angles = []
    for side, old in before.items():
        new, values = state[f"basis_{side}"][0], state[f"factor_{side}"][0].diagonal()
        # The old vector that a new one came from is not known here; as long as they turn by less than 45 degrees
        # it is the nearest.
        nearest = (old.mT @ new).abs().amax(0)
        assert float(nearest.min()) > math.cos(math.pi / 4)
        angles.append(math.acos(float((values * nearest).sum() / values.sum())))
    found = measurements(optimizer)
    assert found["optimizer/rotation_degrees/soap_2_sides"] == pytest.approx(math.degrees(sum(angles) / 2), rel=1e-6)


def test_the_change_of_roots() -> None:
    params = parameters([(6, 4)], torch.float64)
    optimizer, _ = probed(lambda p: Shampoo(p, lr=1e-2, precondition_frequency=1, start_step=1), params)
    train(optimizer, params, range(1))
    assert "optimizer/root_change/shampoo_2_sides" not in measurements(optimizer), "the first have no predecessors"
    state = optimizer.state[params[0]]
    before = {side: state[f"root_{side}"].clone() for side in (0, 1)}
    train(optimizer, params, range(1, 2))
    changes = [float((state[f"root_{side}"] - old).norm() / old.norm()) for side, old in before.items()]
    found = measurements(optimizer)
    assert found["optimizer/root_change/shampoo_2_sides"] == pytest.approx(sum(changes) / 2, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# When it is measured
# ---------------------------------------------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Notes the calls of the metrics' methods."""
    calls: list[str] = []
    for name in names:
        original = getattr(RecordingMetrics, name)

        def noted(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Any:
            calls.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(RecordingMetrics, name, noted)
    return calls


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_measured_in_steps_that_nobody_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "watching", "refreshing", "rotated", "replaced", "_watch")
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, range(7))
    assert calls == []
    optimizer.profiler = StepProfiler()
    train(optimizer, params, range(7, 13))
    assert "_watch" not in calls
    assert not any("update" in key for key in measurements(optimizer))
    optimizer.profiler.due = True
    train(optimizer, params, range(13, 14))
    assert "_watch" in calls


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_measuring_changes_no_bit(name: str) -> None:
    outcomes = []
    for measure in (False, True):
        params = parameters()
        optimizer = OPTIMIZERS[name](params)
        for step in range(8):
            if measure:
                optimizer.profiler = optimizer.profiler or StepProfiler()
                optimizer.profiler.due = step % 2 == 0
            train(optimizer, params, [step])
            if measure and step % 3 == 0:
                measurements(optimizer)
        outcomes.append([param.detach().clone() for param in params])
    if name == "shampoo, background":
        return  # its roots come when they are done
    assert all(map(torch.equal, *outcomes))


def test_a_reading_starts_anew() -> None:
    params = parameters()
    optimizer, profiler = probed(OPTIMIZERS["soap"], params)
    profiler.due = True
    train(optimizer, params, range(4))
    first = measurements(optimizer)
    assert {"optimizer/step_ms", "optimizer/rotation_degrees/soap_2_sides"} <= first.keys()
    assert 0 < first["optimizer/refresh_share/soap_2_sides"] < 1
    assert first["optimizer/refresh_ms/soap_2_sides"] == pytest.approx(
        first["optimizer/refresh_share/soap_2_sides"] * first["optimizer/step_ms"]
    )
    assert measurements(optimizer).keys() == diagnostics(optimizer).keys() | {
        "optimizer/factor_off_diagonal/soap_2_sides",
        "optimizer/factor_off_diagonal/soap_3_sides",
    }


def test_a_skipped_step_measures_no_update() -> None:
    params = parameters()
    optimizer, profiler = probed(OPTIMIZERS["soap"], params)
    train(optimizer, params, range(3))
    measurements(optimizer)
    profiler.due = True
    for param in params:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    found = measurements(optimizer)
    assert found["optimizer/skipped_steps"] == 1.0
    assert not any("update" in key or "rotation" in key for key in found)
    assert all(math.isfinite(value) for value in found.values())


def test_the_probe_is_not_saved_and_stays_over_a_load() -> None:
    params = parameters()
    optimizer, profiler = probed(OPTIMIZERS["soap"], params)
    train(optimizer, params, range(3))
    assert copy.deepcopy(optimizer).profiler is None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.profiler is profiler
    train(optimizer, params, range(3, 4))
    assert measurements(optimizer)["optimizer/step_ms"] > 0


def test_an_optimizer_without_a_probe_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got an optimizer without a profiler.*set optimizer\.profiler = StepProfiler\(\)"
    ):
        measurements(SOAP(parameters()))


def test_weights_of_zero_have_no_ratio() -> None:
    params = [nn.Parameter(torch.zeros(4, 4))]
    optimizer, profiler = probed(lambda p: MARS(p, lr=1e-2), params)
    profiler.due = True
    train(optimizer, params, range(1))
    found = measurements(optimizer)
    assert found["optimizer/update_rms/mars_adamw"] > 0
    assert "optimizer/update_ratio/mars_adamw" not in found


@pytest.mark.cuda
def test_events_of_a_device_are_read_later() -> None:
    watch, device = Stopwatch(), torch.device("cuda")
    big = torch.randn(2048, 2048, device=device)
    for _ in range(3):
        with watch.running(device):
            big = torch.linalg.qr(big).Q
    assert watch.take() > 0
    assert watch.take() == 0
    params = [nn.Parameter(param.detach().to(device)) for param in parameters()]
    optimizer, profiler = probed(OPTIMIZERS["soap"], params)
    profiler.due = True
    for _ in range(4):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    found = measurements(optimizer)
    assert 0 < found["optimizer/refresh_share/soap_2_sides"] < 1


# ---------------------------------------------------------------------------------------------------------------------
# Many ranks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_measure_the_whole(tmp_path: Path) -> None:
    ranks.run("sharded_metrics.ranks_measure_the_whole", 2, tmp_path)


@pytest.mark.slow
def test_owners_measure_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    for count in (1, 2):  # three cannot average three equal gradients without rounding
        ranks.run("sharded_metrics.owners_measure_as_one_process", count, tmp_path / str(count))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", None], ids=["fsdp", "ddp"])
@pytest.mark.parametrize("mode", ["local", "owner"])
def test_ranks_log_together(mode: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    ranks.run("sharded_metrics.trainers_log", 2, tmp_path, mode=mode, kind=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------------------


def run(folder: Path, cls: type[Trainer] = Trainer, callbacks: Any = None, **changes: Any) -> Trainer:
    args = tiny.arguments(folder, **{"optim_args": "precondition_frequency=2,log_every=4", **changes})
    trainer = cls(tiny.gpt2(), args, train_dataset=tiny.Counting(), callbacks=callbacks)
    trainer.train()
    return trainer


def entries(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "optimizer/step_ms" in entry]


WANTED = {
    f"optimizer/{what}"
    for what in (
        *("step_ms", "skipped_steps", "failed_refreshes", "seeded_share", "factor_off_diagonal"),
        *("update_rms/adam", "update_ratio/adam", "update_rms/soap_2_sides", "update_ratio/soap_2_sides"),
        *("factor_off_diagonal/soap_2_sides", "rotation_degrees/soap_2_sides"),
        *("refresh_ms/soap_2_sides", "refresh_share/soap_2_sides"),
    )
}


@pytest.mark.parametrize("cls", [Trainer, SoapTrainer])
def test_every_trainer_logs_what_log_every_asks_for(cls: type[Trainer], tmp_path: Path) -> None:
    """SoapTrainer did alone; an option that a plain Trainer took and did nothing with."""
    trainer = run(tmp_path, cls, logging_steps=4)
    assert [entry["step"] for entry in entries(trainer)] == [4, 8]
    for entry in entries(trainer):
        assert {key for key in entry if key.startswith("optimizer/")} == WANTED
        assert all(math.isfinite(value) for value in entry.values())
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8]
    trainer.train()
    assert [entry["step"] for entry in entries(trainer)] == [4, 8], "a second run has one callback still"


def test_tensorboard_shows_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, report_to="tensorboard")
    folders = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    assert folders
    tags: dict[str, list[tuple[int, float]]] = {}
    for folder in folders:
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        tags |= {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {f"train/{key}" for key in WANTED} <= tags.keys()
    assert all([step for step, _ in tags[f"train/{key}"]] == [4, 8] for key in WANTED)


def test_the_callback_serves_an_optimizer_made_by_hand(tmp_path: Path) -> None:
    model = tiny.gpt2()
    optimizer = SOAP(model.parameters(), lr=3e-3, precondition_frequency=2)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    args = tiny.arguments(tmp_path, optim="adamw_torch")
    trainer = Trainer(
        model,
        args,
        train_dataset=tiny.Counting(),
        callbacks=[SoapMetricsCallback(every=3)],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert [entry["step"] for entry in entries(trainer)] == [3, 6]


def test_the_callback_says_when_it_has_nothing_to_measure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, optim="adamw_torch", optim_args=None, callbacks=[SoapMetricsCallback(every=2)])
    assert entries(trainer) == []
    assert caplog.text.count("SoapMetricsCallback got AdamW, wanted a Trainer with an optimizer of hf_soap") == 1
    with pytest.raises(ValueError, match=r"every must be >= 1, got 0; omit the callback to log nothing"):
        SoapMetricsCallback(every=0)


def test_a_callback_of_ones_own_is_not_doubled(tmp_path: Path) -> None:
    trainer = run(tmp_path, callbacks=[SoapMetricsCallback(every=2)])
    assert [entry["step"] for entry in entries(trainer)] == [2, 4, 6, 8]


def test_exact_mars_measures_the_step_alone(tmp_path: Path) -> None:
    """Not the trip to the previous weights and back: Adam moves no entry by more than about the learning rate."""
    trainer = run(tmp_path, SoapTrainer, optim="mars", optim_args="exact=true,log_every=4", weight_decay=0.0)
    assert len(entries(trainer)) == 2
    for entry in entries(trainer):
        assert 0 < entry["optimizer/update_rms/mars_adamw"] < 2 * trainer.args.learning_rate


def test_a_resumed_run_measures_from_where_it_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = run(tmp_path, **settings)
    args = tiny.arguments(tmp_path, optim_args="precondition_frequency=2,log_every=4", **settings)
    resumed = Trainer(tiny.gpt2(), args, train_dataset=tiny.Counting())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    want, got = entries(whole)[-1], entries(resumed)[-1]
    assert want["step"] == got["step"] == 8
    for key in WANTED:
        if not key.split("/")[1].endswith(("_ms", "refresh_share")):
            assert got[key] == want[key], key

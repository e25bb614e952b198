"""The names in TrainingArguments and everything that the arguments go through."""

import copy
import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_soap
from hf_soap import SOAP
from hf_soap.hub import arguments
from hf_soap.optimizers.names import ENTRIES
from hf_soap.trainer import patches, registry

names = pytest.mark.parametrize("name", ENTRIES)


@pytest.fixture
def fresh_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """A log in which nothing was said yet, at the level of a user who asked for INFO."""
    registry._report_once.cache_clear()
    registry._warn_learning_rate_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("hf_soap"), "level", logging.NOTSET)
    caplog.set_level(logging.INFO, "hf_soap")
    return caplog


def made_from(args: TrainingArguments, model: torch.nn.Module | None = None) -> Any:
    """The optimizer that the Trainer would make, with its own groups."""
    trainer = Trainer(model=model or torch.nn.Linear(4, 4), args=args)
    return trainer.create_optimizer()


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------


@names
def test_a_name_is_a_member_like_the_others(name: str) -> None:
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()]
    assert member is getattr(OptimizerNames, name.upper())
    assert member in list(OptimizerNames)
    assert isinstance(member, OptimizerNames)
    assert member == name
    assert hash(member) == hash(name)
    assert (member.name, member.value) == (name.upper(), name)


def test_registering_again_changes_nothing() -> None:
    before = [member.value for member in OptimizerNames]
    method = Trainer.get_optimizer_cls_and_kwargs
    patches.install()
    assert [member.value for member in OptimizerNames] == before
    assert len(set(before)) == len(before)
    assert Trainer.get_optimizer_cls_and_kwargs is method


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("sop", "did you mean soap?"),
        ("soapp", "did you mean soap?"),
        ("SOAP", "did you mean soap?"),
        ("mras", "did you mean mars?"),
        ("adamw", "did you mean adamw_torch"),
        ("adamw_trch", "did you mean adamw_torch"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path: Path, wrong: str, hint: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny.arguments(tmp_path, optim=wrong)
    assert f"unknown optim {wrong!r}: {hint}" in str(error.value)
    assert "adamw_torch" in str(error.value)


def test_a_name_like_no_other_gets_the_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"xyzzy is not a valid .*'adamw_torch', .*'soap'"):
        tiny.arguments(tmp_path, optim="xyzzy")


@names
def test_names_come_from_the_command_line_and_from_files(name: str, tmp_path: Path) -> None:
    values = {
        "output_dir": str(tmp_path),
        "optim": name,
        "optim_args": "state_dtype=bfloat16,log_every=7",
        "use_cpu": True,
    }
    command = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    (tmp_path / "args.json").write_text(json.dumps(values))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(values))
    parser = HfArgumentParser(TrainingArguments)
    for (parsed,) in (
        parser.parse_args_into_dataclasses(command),
        parser.parse_json_file(str(tmp_path / "args.json")),
        parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ):
        assert parsed.optim is OptimizerNames(name)
        assert arguments.resolve(parsed).state_dtype == "bfloat16"
        assert arguments.resolve(parsed).log_every == 7


def test_an_unknown_name_on_the_command_line_ends_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", "--optim", "sope"])
    assert "'soap'" in capsys.readouterr().err


@names
def test_arguments_survive_what_is_done_to_arguments(name: str, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim=name, optim_args="log_every=7")
    assert args.to_dict()["optim"] == name
    assert json.loads(args.to_json_string())["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    for copied in (
        copy.copy(args),
        copy.deepcopy(args),
        dataclasses.replace(args, learning_rate=0.1),
        pickle.loads(pickle.dumps(args)),
        TrainingArguments(**{key: value for key, value in args.to_dict().items() if key in ("output_dir", "optim")}),
        tiny.arguments(tmp_path, optim="sgd").set_optimizer(name, learning_rate=0.1),
    ):
        assert copied.optim == name
        assert arguments.optimizer_name(copied) == name
        assert isinstance(made_from(copied), ENTRIES[name].optimizer)


IMPORT_TRANSFORMERS_FIRST = """
import sys
sys.modules["hf_soap"] = None  # as where it is not installed
import torch
args = torch.load(sys.argv[1], weights_only=False)
assert type(args.optim) is str and args.optim == "soap", repr(args.optim)
assert args.to_dict()["optim"] == "soap"

from transformers import Trainer, TrainingArguments
try:
    TrainingArguments("x", optim="soap")
except ValueError:
    pass
else:
    raise SystemExit("registered without an import")
del sys.modules["hf_soap"]
import hf_soap
args = TrainingArguments("x", optim="soap", use_cpu=True, report_to="none")
assert isinstance(Trainer(torch.nn.Linear(2, 2), args).create_optimizer(), hf_soap.SOAP)
"""

IMPORT_HF_SOAP_FIRST = """
import sys
import hf_soap
assert "transformers" not in sys.modules
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
import torch
assert OptimizerNames("soap") in list(OptimizerNames)
args = TrainingArguments("x", optim="soap", use_cpu=True, report_to="none")
assert isinstance(Trainer(torch.nn.Linear(2, 2), args).create_optimizer(), hf_soap.SOAP)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_soap")]
"""


def run_python(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_saved_arguments_load_where_the_package_is_missing_and_imports_may_come_late(tmp_path: Path) -> None:
    """A Hub checkpoint's training_args.bin could be opened only by those who had this package installed.

    The process then goes on to import the package after transformers, the other order than the next test's.
    """
    torch.save(tiny.arguments(tmp_path), tmp_path / "training_args.bin")
    run_python(IMPORT_TRANSFORMERS_FIRST, str(tmp_path / "training_args.bin"))


@pytest.mark.slow  # the other tests import in this order as well
def test_the_package_may_be_imported_first_and_then_leaves_transformers_alone() -> None:
    run_python(IMPORT_HF_SOAP_FIRST)


# ---------------------------------------------------------------------------------------------------------------------
# From arguments to an optimizer
# ---------------------------------------------------------------------------------------------------------------------


@names
def test_the_trainer_makes_the_class_itself(name: str, tmp_path: Path) -> None:
    """Not a subclass of it, which a pickle could not find again, with the Trainer's rates."""
    args = tiny.arguments(tmp_path, optim=name, learning_rate=0.02, weight_decay=0.3)
    optimizer = made_from(args)
    assert type(optimizer) is ENTRIES[name].optimizer
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    assert type(pickle.loads(pickle.dumps(optimizer))) is type(optimizer)


@pytest.mark.parametrize(("name", "cls"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_other_optimizers_are_left_alone(name: str, cls: type, tmp_path: Path) -> None:
    assert type(made_from(tiny.arguments(tmp_path, optim=name))) is cls


@pytest.mark.parametrize(
    ("given", "betas", "eps"),
    [
        ({}, (0.95, 0.95), 1e-8),
        ({"adam_beta1": 0.9, "adam_beta2": 0.999}, (0.95, 0.95), 1e-8),
        ({"adam_beta1": 0.8}, (0.8, 0.95), 1e-8),
        ({"adam_beta2": 0.98, "adam_epsilon": 1e-6}, (0.95, 0.98), 1e-6),
        ({"adam_beta1": 0.8, "optim_args": "beta1=0.7"}, (0.7, 0.95), 1e-8),
        ({"adam_beta1": 0.8, "optim_args": "beta2=0.7"}, (0.8, 0.7), 1e-8),
        ({"adam_epsilon": 1e-6, "optim_args": "betas=(0.9,0.999),eps=1e-5"}, (0.9, 0.999), 1e-5),
    ],
)
def test_where_betas_and_eps_come_from(
    given: dict[str, Any], betas: tuple[float, float], eps: float, tmp_path: Path
) -> None:
    """optim_args, else adam_* where it differs from the Transformers default, else what was published."""
    for group in made_from(tiny.arguments(tmp_path, **given)).param_groups:
        assert (group["betas"], group["eps"]) == (betas, eps)


def test_a_wrong_adam_beta_is_answered_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beta1 must be in \[0, 1\), got 1.0"):
        made_from(tiny.arguments(tmp_path, adam_beta1=1.0))


def test_an_adam_argument_that_the_optimizer_has_no_option_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"optim='mars_lion' got adam_beta2=0.98, wanted its default, 0.999: .*remove"
    ):
        made_from(tiny.arguments(tmp_path, optim="mars_lion", adam_beta2=0.98))
    made_from(tiny.arguments(tmp_path, optim="mars_lion", adam_beta1=0.8))


def test_the_forgotten_learning_rate_is_noticed_once(fresh_log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for _ in range(3):
        made_from(tiny.arguments(tmp_path, learning_rate=5e-5))
    warnings = [record.getMessage() for record in fresh_log.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "learning_rate is 5e-05" in warnings[0]
    assert "published with 0.003" in warnings[0]


def test_a_chosen_learning_rate_is_not_commented_on(fresh_log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    made_from(tiny.arguments(tmp_path, learning_rate=1e-4))
    assert not [record for record in fresh_log.records if record.levelno == logging.WARNING]


def test_settings_are_logged_once(fresh_log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for eps in (1e-7, 1e-7, 1e-6):
        made_from(tiny.arguments(tmp_path, optim_args=f"eps={eps}"))
    said = [message for message in fresh_log.messages if message.startswith("optim=soap runs with")]
    assert len(said) == 2
    assert "lr=0.003" in said[0]
    assert "eps=1e-07" in said[0]
    assert "eps=1e-06" in said[1]
    assert any("routes parameters as follows" in message for message in fresh_log.messages)


@pytest.mark.parametrize(
    "optim_args", ["precondition_freq=5", "precondition_frequency=0", "betas=0.9", "adam_modules=nope"]
)
@pytest.mark.parametrize("cls", [Trainer, hf_soap.SoapTrainer])
def test_wrong_options_stop_a_run_before_its_first_step(cls: type[Trainer], optim_args: str, tmp_path: Path) -> None:
    model = tiny.gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"precondition_frequency|betas|matches no trainable parameter"):
        cls(model, tiny.arguments(tmp_path, optim_args=optim_args), train_dataset=tiny.Counting()).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_fsdp_1_is_refused_with_a_way_out(tmp_path: Path) -> None:
    # transformers 4 tells accelerate by the environment, where the next test would find it.
    with (
        mock.patch.dict(os.environ),
        pytest.raises(ValueError, match=r"optim='soap' got FSDP version 1, wanted 2: .*fsdp_config={'version': 2}"),
    ):
        arguments.resolve(tiny.arguments(tmp_path, fsdp="full_shard", fsdp_config={"version": 1}))


def test_fsdp_2_is_taken(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"FSDP_VERSION": "2"}):
        arguments.resolve(tiny.arguments(tmp_path, fsdp="full_shard", fsdp_config={"version": 2}))


def test_deepspeed_is_refused_with_a_way_out(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}  # as an argument it needs the package
    with pytest.raises(ValueError, match=r"optim='soap' got DeepSpeed, wanted matrices.*use FSDP2"):
        arguments.resolve(args)


@pytest.mark.parametrize(
    ("launched", "version", "way_out"),
    [("FSDP", "1", "fsdp_version: 2"), ("FSDP", "2", None), ("DEEPSPEED", None, "use FSDP2")],
)
def test_sharding_that_only_the_launcher_knows_is_seen(
    launched: str, version: str | None, way_out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --use_fsdp` speaks through the environment: the arguments say nothing of it."""
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=way_out) if way_out else nullcontext():
        arguments.resolve(args)


# ---------------------------------------------------------------------------------------------------------------------
# Relatives of TrainingArguments
# ---------------------------------------------------------------------------------------------------------------------


@names
def test_seq2seq(name: str, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, Seq2SeqTrainingArguments, optim=name)
    trainer = Seq2SeqTrainer(model=torch.nn.Linear(4, 4), args=args)
    assert type(trainer.create_optimizer()) is ENTRIES[name].optimizer


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    assert arguments.resolve(tiny.arguments(tmp_path, trl.SFTConfig, optim_args="eps=1e-6")).eps == 1e-6
    command = ["--output_dir", str(tmp_path), "--optim", "soap", "--optim_args", "beta1=0.8", "--use_cpu", "true"]
    (args,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(command)
    assert args.optim is OptimizerNames("soap")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"optim": "soap", "output_dir": str(tmp_path), "use_cpu": True})
    )
    (args,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert args.optim is OptimizerNames("soap")


def test_hyperparameter_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    seen = []

    class Recording(Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            optimizer = super().create_optimizer(*args)
            seen.append((type(optimizer), optimizer.defaults["lr"], optimizer.defaults["precondition_frequency"]))
            return optimizer

    trainer = Recording(
        args=tiny.arguments(tmp_path, max_steps=2),
        model_init=lambda: tiny.gpt2(),
        train_dataset=tiny.Counting(),
        eval_dataset=tiny.Counting(),
    )
    best = trainer.hyperparameter_search(
        lambda trial: {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
            "optim_args": f"precondition_frequency={trial.suggest_int('precondition_frequency', 1, 9)}",
        },
        n_trials=3,
        direction="minimize",
        backend="optuna",
    )
    assert [cls for cls, _, _ in seen] == [SOAP] * 3
    assert len(set(seen)) == 3
    assert best.hyperparameters["learning_rate"] in [lr for _, lr, _ in seen]

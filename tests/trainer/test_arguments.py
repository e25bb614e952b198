"""Options as files and programs give them, and what users are told about the values that win."""

import contextlib
import json
import logging
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    GPT2LMHeadModel,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_soap import (
    MARS,
    SOAP,
    MarsConfig,
    Shampoo,
    ShampooConfig,
    SoapConfig,
    SoapTrainer,
)
from hf_soap.config import options
from hf_soap.config.options import OptimizerConfig, near_options, parse_optim_args
from hf_soap.hub import arguments
from hf_soap.optimizers.names import ENTRIES
from hf_soap.trainer import registry


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """A log in which nothing was said yet, at the level of a user who asked for INFO."""
    registry._report_once.cache_clear()
    registry._warn_learning_rate_once.cache_clear()
    caplog.set_level(logging.INFO, "hf_soap")
    return caplog


def made_from(args: TrainingArguments, model: Any = None) -> Any:
    return Trainer(model=model or torch.nn.Linear(4, 4), args=args).create_optimizer()


# ---------------------------------------------------------------------------------------------------------------------
# optim_args from files
# ---------------------------------------------------------------------------------------------------------------------

CONFIG = SoapConfig(precondition_frequency=2, one_sided=True, beta1=0.9, beta2=0.99, eps=1e-6, adam_modules="weight")

FORMS: dict[str, Any] = {
    "mapping": {
        "precondition_frequency": 2,
        "one_sided": True,
        "betas": [0.9, 0.99],
        "eps": 1e-6,
        "adam_modules": "weight",
        "block_size": None,
    },
    "mapping of text": {
        "precondition_frequency": "2",
        "one_sided": "true",
        "betas": "(0.9,0.99)",
        "eps": "1e-6",  # which is how YAML reads 1e-6
        "adam_modules": "weight",
        "block_size": "none",
    },
    "list": ["precondition_frequency=2", "one_sided=true", "betas=(0.9,0.99)", "eps=1e-6", "adam_modules=weight"],
    "list of several": [
        "precondition_frequency=2, one_sided=true",
        "beta1=0.9,beta2=0.99,eps=1e-6,adam_modules=weight",
    ],
    "text": "precondition_frequency=2,one_sided=true,betas=(0.9,0.99),eps=1e-6,adam_modules=weight",
}
forms = pytest.mark.parametrize("given", FORMS.values(), ids=FORMS.keys())


def assert_is_config(args: TrainingArguments) -> None:
    """The arguments hold text, from which the same comes out again after all that is done to arguments."""
    assert isinstance(args.optim_args, str)
    assert json.loads(args.to_json_string())["optim_args"] == args.optim_args == args.to_sanitized_dict()["optim_args"]
    for each in (args, pickle.loads(pickle.dumps(args)), replace(args, learning_rate=0.1)):
        assert arguments.resolve(each) == CONFIG
    optimizer = made_from(args)
    assert type(optimizer) is SOAP
    assert {group["precondition_frequency"] for group in optimizer.param_groups} == {2}


@forms
@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])
def test_options_in_python(cls: type[TrainingArguments], given: Any, tmp_path: Path) -> None:
    """The keys of a mapping were run together to one option, `precondition_frequencyone_sided`."""
    assert_is_config(tiny.arguments(tmp_path, cls, optim_args=given))
    assert parse_optim_args(given, SoapConfig) == CONFIG


@forms
def test_options_from_a_dict_and_from_files(given: Any, tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path), "optim": "soap", "optim_args": given, "use_cpu": True, "report_to": "none"}
    (tmp_path / "args.json").write_text(json.dumps(values))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(values))
    parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    for (args,) in (
        parser.parse_dict(values),
        parser.parse_json_file(str(tmp_path / "args.json")),
        parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ):
        assert_is_config(args)


@forms
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_from_the_config_of_trl(given: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    values = {"output_dir": str(tmp_path), "optim": "soap", "optim_args": given, "use_cpu": True, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "bf16": False}))
    (args,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert_is_config(args)


@forms
def test_options_that_are_set_later(given: Any, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim="sgd")
    assert_is_config(args.set_optimizer("soap", learning_rate=0.1, args=given))
    args.optim_args = given
    assert arguments.resolve(args) == CONFIG


def test_yaml_as_it_is_written(tmp_path: Path) -> None:
    """YAML reads `off` as false, `3e-3` as text and `none` as text, and users write what the table of options says."""
    (tmp_path / "args.yaml").write_text(
        f"output_dir: {tmp_path}\noptim: shampoo\nlearning_rate: 3e-3\nweight_decay: 1e-2\nadam_epsilon: 1e-6\n"
        "use_cpu: true\noptim_args:\n  nonfinite: off\n  ridge: 1e-5\n  graft: none\n  stagger: yes\n"
    )
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(tmp_path / "args.yaml"))  # type: ignore[arg-type]
    assert (args.learning_rate, args.weight_decay, args.adam_epsilon) == (3e-3, 1e-2, 1e-6)
    assert arguments.resolve(args) == ShampooConfig(nonfinite="off", ridge=1e-5, graft=None, stagger=True, eps=1e-6)


def test_settings_by_module_in_a_file(tmp_path: Path) -> None:
    """YAML of version 1.1 reads 1e-2 as text."""
    (tmp_path / "args.yaml").write_text(
        f"output_dir: {tmp_path}\noptim: soap\nuse_cpu: true\noptim_args:\n  eps: 1e-6\n  modules:\n"
        "    weight: {rule: adam, lr: 1e-2, beta2: 0.5}\n    '@vectors':\n      lr_factor: 2\n      weight_decay: 0\n"
    )
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(tmp_path / "args.yaml"))
    own = {"weight": {"rule": "adam", "lr": 1e-2, "beta2": 0.5}, "@vectors": {"lr_factor": 2, "weight_decay": 0}}
    assert arguments.resolve(args) == SoapConfig(eps=1e-6, modules=own)
    config = SoapTrainer(torch.nn.Linear(4, 4), tiny.arguments(tmp_path), optimizer_config={"modules": own}).args
    assert arguments.resolve(config) == SoapConfig(modules=own)
    matrices, vectors = made_from(replace(args, learning_rate=5e-3)).param_groups
    assert matrices["overrides"] == [{"rule": "adam", "lr_factor": 2.0, "betas": (0.95, 0.5)}]
    assert vectors["overrides"] == [{"lr_factor": 2, "weight_decay": 0}]


def test_a_mapping_is_left_to_an_optimizer_that_is_not_ours(tmp_path: Path) -> None:
    assert tiny.arguments(tmp_path, optim="sgd", optim_args={"momentum": 0.9}).optim_args == {"momentum": 0.9}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["precondition_frequency=2", "0"], r"key=value pairs split by commas, got '0'"),
        (["precondition_frequency", "2"], r"key=value pairs split by commas, got 'precondition_frequency'"),
        ([{"eps": 1e-8}], r"key=value as entries of a list, got {'eps': 1e-08}"),
        (["adam_modules=(", "eps=1"], r"adam_modules must be a regular expression, got '\('"),
        (["eps=1", "eps=1"], r"got eps twice"),
        ({"freq": 2}, r"did you mean precondition_frequency\?"),
        ({"precondition_frequency": 0}, r"precondition_frequency must be >= 1, got 0"),
        ({"precondition_frequency": [2]}, r"precondition_frequency must be a number, text, .*got \[2\]"),
        ({"modules": {"a": {"lr": {1}}}}, r"wanted plain YAML|got the tag"),
        ({"modules": {"a": {"lr": int}}}, r"wanted mappings, lists, text, numbers, true, false or null: "),
        ({"eps": {"value": 1}}, r"eps must be a number, text, .*got {'value': 1}"),
        ({"eps": "tiny"}, r"eps must be float, got 'tiny'"),
        ({"eps": ""}, r"key=value pairs split by commas, got 'eps='"),
        ({"eps": "1,beta1=0.5"}, r"eps must be float, got"),
        ({"eps=1,beta1": 0.5}, r"names of options as keys of a mapping, got 'eps=1,beta1'"),
        ({1: 2}, r"names of options as keys of a mapping, got 1"),
        ({"betas": [0.9]}, r"betas wants two numbers, got '\(0.9\)'"),
        ({"learning_rate": 1e-3}, r"learning_rate is not an option of optim_args; set it as TrainingArguments"),
        ({"wd": 0.1}, r"wd is not an option of optim_args; set it as TrainingArguments\(weight_decay="),
        (5, r"optim_args must be text such as 'eps=1e-8,beta1=0.9', a mapping .*got 5"),
        (b"eps=1", r"optim_args must be text such as .*got b'eps=1'"),
        ({"eps"}, r"optim_args must be text such as .*got {'eps'}"),
    ],
    ids=str,
)
def test_what_is_none_of_these_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    """A list was glued together: `["precondition_frequency=2", "0"]` refreshed every 20 steps without a word."""
    with pytest.raises(ValueError, match=message):
        arguments.resolve(tiny.arguments(tmp_path, optim_args=given))


@pytest.mark.parametrize("empty", [{}, [], (), "", None])
def test_no_options(empty: Any, tmp_path: Path) -> None:
    assert arguments.resolve(tiny.arguments(tmp_path, optim_args=empty)) == SoapConfig()


@pytest.mark.parametrize("pattern", ["a,b", "(a|b)", "x=y", r"h\.[01]\.", "foo\\(", "[(]"])
@pytest.mark.parametrize("shape", ["mapping", "list"])
def test_a_pattern_in_a_file_means_what_it_means_in_text(pattern: str, shape: str) -> None:
    if shape == "mapping":
        found = parse_optim_args({"adam_modules": pattern, "eps": 1e-6}, SoapConfig)
    elif pattern == "a,b":
        found = parse_optim_args([f"adam_modules='{pattern}'", "eps=1e-6"], SoapConfig)
    else:
        found = parse_optim_args([f"adam_modules={pattern}", "eps=1e-6"], SoapConfig)
    assert found == SoapConfig(adam_modules=pattern, eps=1e-6)
    assert options.patterns(found.to_optim_args()) == [pattern]


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("value", [0.125, 1e-12, 3, True, False, None, "both", "off", "a|b", {"a|b": {"lr": 1}}])
def test_every_option_may_stand_in_a_mapping(name: str, value: Any) -> None:
    """Those that can be set to the value are, through YAML and back."""
    cls = ENTRIES[name].config
    config = cls()
    for option in options.option_fields(cls):
        with contextlib.suppress(ValueError):
            config = replace(config, **{option: value})
    assert parse_optim_args(yaml.safe_load(yaml.safe_dump(asdict(config))), cls) == config
    assert parse_optim_args(config.to_optim_args().split(","), cls) == config


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay", "adam_beta2"])
def test_a_number_that_is_none_is_answered_with_how_to_write_it(argument: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be a number, got '3 e-3'; for example 3.0e-3"):
        tiny.arguments(tmp_path, **{argument: "3 e-3"})


# ---------------------------------------------------------------------------------------------------------------------
# What is meant by an unknown option or value
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("freq", "precondition_frequency?"),
        ("frequency", "precondition_frequency?"),
        ("precond_freq", "precondition_frequency?"),
        ("update_freq", "precondition_frequency?"),
        ("preconditon_freqency", "precondition_frequency?"),
        ("precondition-frequency", "precondition_frequency?"),
        ("max_dim", "max_precond_dim?"),
        ("beta", "beta1, beta2 or shampoo_beta?"),
        ("adam_beta1", "beta1 or adam_modules?"),
        ("epsilon", "eps?"),
        ("bias_correction", "correct_bias?"),
        ("one_side", "one_sided or one_sided_modules?"),
    ],
)
def test_an_abbreviation_is_understood(given: str, meant: str) -> None:
    """`freq` was answered with thirty options, those first that are set least."""
    with pytest.raises(ValueError, match=f"unknown option '{given}' of soap: ") as error:
        parse_optim_args(f"{given}=1", SoapConfig)
    assert f"of soap: did you mean {meant} It takes beta1, beta2, eps, " in str(error.value)
    assert str(error.value).endswith("adam_modules, log_every.")


def test_nothing_is_guessed_where_nothing_is_near() -> None:
    assert near_options("zzz", options.option_fields(SoapConfig)) == []
    assert near_options("", options.option_fields(SoapConfig)) == []
    assert near_options("_", options.option_fields(SoapConfig)) == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("state_dtype=bf16", "float32 or bfloat16, got 'bf16'; did you mean bfloat16?"),
        ("state_dtype=fp32", "float32 or bfloat16, got 'fp32'; did you mean float32?"),
        ("state_dtype=float", "float32 or bfloat16, got 'float'; did you mean float32?"),
        ("state_dtype=half", "float32 or bfloat16, got 'half'; did you mean bfloat16?"),
        ("state_dtype=fp8", "float32 or bfloat16, got 'fp8'; did you mean bfloat16?"),
        ("state_dtype=torch.bfloat16", "got 'torch.bfloat16'; did you mean bfloat16?"),
        ("state_dtype=BFLOAT16", "got 'BFLOAT16'; did you mean bfloat16?"),
        ("matmul_dtype=bf16", "float32 or tf32 or bfloat16, got 'bf16'; did you mean bfloat16?"),
        ("matmul_dtype=fp8", "float32 or tf32 or bfloat16, got 'fp8'; did you mean bfloat16?"),
        ("shard_mode=owners", "local or owner, got 'owners'; did you mean owner?"),
    ],
)
def test_a_usual_name_of_a_value_is_understood(given: str, meant: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_optim_args(given, SoapConfig)
    assert str(error.value).endswith(meant)
    with pytest.raises(ValueError, match=r"got torch.bfloat16; did you mean bfloat16\?"):
        SOAP([torch.nn.Parameter(torch.ones(2, 2))], state_dtype=torch.bfloat16)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Which value wins
# ---------------------------------------------------------------------------------------------------------------------


def settings(log: pytest.LogCaptureFixture) -> str:
    (said,) = [record.getMessage() for record in log.records if record.getMessage().startswith("optim=")]
    return said


def test_a_default_of_transformers_that_does_not_count_is_named(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """adam_beta1=0.9, written out, did nothing and nothing said so: it is what the arguments hold anyway."""
    assert made_from(tiny.arguments(tmp_path, adam_beta1=0.9)).defaults["betas"] == (0.95, 0.95)
    said = settings(log)
    assert "beta1=0.95, not adam_beta1=0.9 (optim_args='beta1=0.9' sets that)" in said
    assert "beta2=0.95, not adam_beta2=0.999 (optim_args='beta2=0.999' sets that)" in said
    assert "eps" not in said.partition("defaults for AdamW are ignored")[2]  # 1e-8 both


def test_what_is_said_of_a_default_is_so(log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim_args="beta1=0.9", adam_beta2=0.98)
    assert made_from(args).defaults["betas"] == (0.9, 0.98)
    assert "are ignored" not in settings(log)


ADVICE = "about AdamW's usual rate, up to a few times that"


@pytest.mark.parametrize("origin", ["from scratch", "from_pretrained", "adapters", "no model of transformers"])
def test_the_learning_rate_to_start_from_depends_on_the_task(
    origin: str, tiny_model: Path, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Who fine-tuned at 5e-5 was told to take 3e-3, sixty times as much."""
    model: Any = {
        "from scratch": tiny.gpt2,
        "from_pretrained": lambda: GPT2LMHeadModel.from_pretrained(tiny_model),
        "adapters": lambda: get_peft_model(tiny.gpt2(), LoraConfig(r=2)),
        "no model of transformers": lambda: torch.nn.Linear(4, 4),
    }[origin]()
    made_from(tiny.arguments(tmp_path, learning_rate=5e-5), model)
    (said,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    scratch = "soap is published with 0.003 for training from scratch"
    assert (
        said
        == "optim=soap: learning_rate is 5e-05, the Transformers default for AdamW. Set learning_rate: "
        + {
            "from scratch": f"{scratch}; to fine-tune pretrained weights start from {ADVICE}.",
            "from_pretrained": f"to fine-tune '{tiny_model}' start from {ADVICE}; {scratch}.",
            "adapters": f"for adapters start from {ADVICE}; {scratch}.",
            "no model of transformers": f"{scratch}; to fine-tune pretrained weights start from {ADVICE}.",
        }[origin]
    )


def test_a_new_model_of_a_known_shape_is_told_both(
    tiny_model: Path, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Nothing in it tells it from a loaded one: its config has the same name."""
    model = GPT2LMHeadModel(AutoConfig.from_pretrained(tiny_model))
    made_from(tiny.arguments(tmp_path, learning_rate=5e-5, optim="mars_lion"), model)
    (said,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert "start from a tenth to a third of AdamW's usual rate" in said
    assert "mars_lion is best started from 0.0003 for training from scratch" in said


# ---------------------------------------------------------------------------------------------------------------------
# optimizer_config
# ---------------------------------------------------------------------------------------------------------------------


def default_optim() -> str:
    return str(TrainingArguments.__dataclass_fields__["optim"].default)


@pytest.mark.parametrize(
    ("optim", "given", "config", "cls"),
    [
        (None, SoapConfig(eps=1e-6), SoapConfig(eps=1e-6), SOAP),
        (None, {"name": "soap", "eps": 1e-6}, SoapConfig(eps=1e-6), SOAP),
        ("soap", {"eps": "1e-6", "betas": (0.9, 0.99)}, SoapConfig(eps=1e-6, beta1=0.9, beta2=0.99), SOAP),
        ("shampoo", {"name": "shampoo", "graft": None}, ShampooConfig(graft=None), Shampoo),
        (None, {"name": "mars"}, MarsConfig(), MARS),
    ],
    ids=str,
)
def test_a_config_or_a_mapping(
    optim: str | None, given: Any, config: OptimizerConfig, cls: type, tmp_path: Path
) -> None:
    """A mapping ended in `'dict' object has no attribute 'to_optim_args'`."""
    args = tiny.arguments(tmp_path, optim=optim or default_optim())
    for _ in range(2):  # the same arguments again, as they are after the first trainer
        trainer = SoapTrainer(tiny.gpt2(), args, optimizer_config=given)
        assert arguments.resolve(trainer.args) == config
        optimizer: Any = trainer.create_optimizer()
        assert type(optimizer) is cls


@pytest.mark.parametrize(
    ("optim", "given", "message"),
    [
        (None, {"eps": 1e-6}, r"does not name its optimizer, .*add 'name': 'soap', or use hf_soap.SoapConfig"),
        (None, {"name": "sope"}, r"names the unknown optimizer 'sope': did you mean soap\? Names are soap"),
        ("soap", {"name": "shampoo"}, r"got optim='soap' with a config of shampoo"),
        ("soap", {"freq": 2}, r"did you mean precondition_frequency\?"),
        ("soap", SoapConfig, r"optimizer_config must be a config such as hf_soap.SoapConfig\(.*got <class"),
        ("soap", "eps=1e-6", r"optimizer_config must be a config such as hf_soap.SoapConfig\(.*got 'eps=1e-6'"),
    ],
    ids=str,
)
def test_what_names_no_optimizer_is_refused(optim: str | None, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SoapTrainer(tiny.gpt2(), tiny.arguments(tmp_path, optim=optim or default_optim()), optimizer_config=given)


def test_a_config_wins_over_the_arguments_of_adam(tmp_path: Path) -> None:
    """What a config had at its default was not written down, and adam_beta1 decided in its place."""
    args = tiny.arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6)
    optimizer: Any = SoapTrainer(tiny.gpt2(), args, optimizer_config=SoapConfig(beta2=0.9)).create_optimizer()
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.95, 0.9), 1e-8)

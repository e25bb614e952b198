"""Options: what is accepted, and what the error for anything else says."""

import contextlib
import inspect
import itertools
import typing
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from hf_soap import MARS, SOAP, KlSoapConfig, MarsConfig, MarsLionConfig, Shampoo, SoapConfig
from hf_soap.config.options import (
    OptimizerConfig,
    nearest,
    option_fields,
    option_table,
    parse_optim_args,
    patterns,
    preset_table,
)
from hf_soap.optimizers.names import ENTRIES, Entry
from hf_soap.planning.plan import build

entries = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())


# What is wrong and what it must be answered with: the value as it came, what was wanted, and a way out.
WRONG = {
    "precondition_frequency=0": r"precondition_frequency must be >= 1, got 0; use 1 to refresh at every step",
    "precondition_frequency=-3": r"precondition_frequency must be >= 1, got -3; use 1",
    "precondition_frequency=2.5": r"precondition_frequency must be int, got '2.5'",
    "precondition_frequency=often": r"precondition_frequency must be int, got 'often'",
    "precondition_freq=5": r"unknown option 'precondition_freq' of soap: did you mean precondition_frequency\? It",
    "freqency=5": r"unknown option 'freqency' of soap: .*It takes .*precondition_frequency",
    "zzz=5": r"unknown option 'zzz' of soap: It takes .*beta1",
    "max_precond_dim=-1": r"max_precond_dim must be >= 0, got -1; use 0 to factor no side",
    "block_size=0": r"block_size must be >= 1, got 0; the default is none",
    "beta1=1": r"beta1 must be in \[0, 1\), got 1.0; the default is 0.95",
    "beta2=-0.1": r"beta2 must be in \[0, 1\), got -0.1; the default is 0.95",
    "shampoo_beta=1.5": r"shampoo_beta must be in \[0, 1\), got 1.5; the default is none",
    "beta1=nan": r"beta1 must be in \[0, 1\), got nan",
    "eps=-1e-8": r"eps must be >= 0, got -1e-08; the default is 1e-08",
    "eps=inf": r"eps must be >= 0, got inf",
    "eps=nan": r"eps must be >= 0, got nan",
    "eps=tiny": r"eps must be float, got 'tiny'",
    "eps=none": r"eps must be float, got 'none'",
    "merge_dims=maybe": r"merge_dims must be true or false, got 'maybe'",
    "one_sided=true;stagger=true": r"one_sided must be true or false, got 'true;stagger=true'",
    "nonfinite=raise": r"nonfinite must be skip or off, got 'raise'",
    "lora_sides=left": r"lora_sides must be rank or both or none, got 'left'",
    "log_every=-1": r"log_every must be >= 0, got -1; the default is 0",
    "adam_modules=(": r"adam_modules must be a regular expression, got '\(': ",
    "one_sided_modules=*": r"one_sided_modules must be a regular expression, got '\*': ",
    "lr=1e-3": r"lr is not an option of optim_args; set it as TrainingArguments\(learning_rate=",
    "weight_decay=0.1": r"weight_decay is not an option of optim_args; set it as TrainingArguments\(weight_decay=",
    "stagger": r"optim_args wants key=value pairs split by commas, got 'stagger'; for example eps=1e-8",
    "eps=": r"optim_args wants key=value pairs split by commas, got 'eps='; for example",
    "=3": r"optim_args wants key=value pairs split by commas, got '=3'; for example",
    "eps=1e-8 beta1=0.9": r"eps must be float, got '1e-8 beta1=0.9'",
    "eps=1e-8,eps=1e-9": r"optim_args got eps twice, wanted it once; remove one",
    "betas=(0.9,0.95),beta1=0.8": r"optim_args got beta1 twice, wanted it once; remove one",
    "betas=0.9": r"betas wants two numbers, got '0.9'; write betas=\(0.95,0.95\), or beta1= and beta2=",
    "betas=(0.9,0.95,0.99)": r"betas wants two numbers, got '\(0.9,0.95,0.99\)'; write betas=",
    "betas=(0.9,1)": r"beta2 must be in \[0, 1\), got 1.0",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_wrong_optim_args(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_optim_args(text, SoapConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precondition_frequency": 0}, r"precondition_frequency must be >= 1, got 0; use 1"),
        ({"precondition_frequency": True}, r"precondition_frequency must be int, got True"),
        ({"precondition_frequency": 10.0}, r"precondition_frequency must be int, got 10.0"),
        ({"precondition_frequency": "10"}, r"precondition_frequency must be int, got '10'"),
        ({"max_precond_dim": None}, r"max_precond_dim must be int, got None"),
        ({"eps": "1e-8"}, r"eps must be float, got '1e-8'"),
        ({"eps": 10**400}, r"eps must be >= 0, got 10{99}\.\.\. \(401 characters\)"),
        ({"eps": True}, r"eps must be float, got True"),
        ({"merge_dims": 1}, r"merge_dims must be true or false, got 1"),
        ({"nonfinite": "raise"}, r"nonfinite must be skip or off, got 'raise'"),
        ({"block_size": 0}, r"block_size must be >= 1, got 0"),
        ({"shampoo_beta": 1.0}, r"shampoo_beta must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_wrong_values_in_python(values: dict[str, Any], message: str) -> None:
    """A config, the constructor and a param group answer alike, and nothing was made."""
    with pytest.raises(ValueError, match=message):
        SoapConfig(**values)
    with pytest.raises(ValueError, match=message):
        SOAP([Parameter(torch.ones(2, 2))], **values)
    with pytest.raises(ValueError, match=message):
        SOAP([{"params": [Parameter(torch.ones(2, 2))], **values}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"betas": 0.9}, r"betas must be two numbers, got 0.9; for example \("),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\); for example \("),
        ({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, torch.nan)}, r"beta2 must be in \[0, 1\), got nan"),
        ({"lr": -1e-3}, r"lr must be a finite number >= 0, got -0.001"),
        ({"lr": torch.nan}, r"lr must be a finite number >= 0, got nan"),
        ({"lr": torch.inf}, r"lr must be a finite number >= 0, got inf"),
        ({"lr": "1e-3"}, r"lr must be a finite number >= 0, got '1e-3'"),
        ({"lr": None}, r"lr must be a finite number >= 0, got None"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got a tensor of shape \(2,\)"),
        ({"lr": torch.tensor(-1.0)}, r"lr must be .*>= 0, got .*-1"),
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number >= 0, got -0.1"),
        ({"weight_decay": True}, r"weight_decay must be a finite number >= 0, got True"),
    ],
    ids=str,
)
def test_wrong_constructor_arguments(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([Parameter(torch.ones(2, 2))], **values)
    with pytest.raises(ValueError, match=message):
        SOAP([{"params": [Parameter(torch.ones(2, 2))], **values}])


def test_an_unknown_rule_of_a_group() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of soap, adam, got 'sgd'"):
        SOAP([{"params": [Parameter(torch.ones(2, 2))], "rule": "sgd"}])


@pytest.mark.parametrize(
    ("text", "config"),
    [
        (None, SoapConfig()),
        ("", SoapConfig()),
        (" , ", SoapConfig()),
        ("eps=1e-6,", SoapConfig(eps=1e-6)),
        (" eps = 1e-6 , one_sided = True ", SoapConfig(eps=1e-6, one_sided=True)),
        ("betas=(0.9,0.99)", SoapConfig(beta1=0.9, beta2=0.99)),
        ("betas=[0.9, 0.99],eps=0", SoapConfig(beta1=0.9, beta2=0.99, eps=0.0)),
        ("block_size=none,shampoo_beta=None", SoapConfig()),
        ("stagger=yes,merge_dims=on,one_sided=1", SoapConfig(stagger=True, merge_dims=True, one_sided=True)),
        ("correct_bias=no", SoapConfig(correct_bias=False)),
        ("correct_bias=0", SoapConfig(correct_bias=False)),
        ("adam_modules=(lm_head|wte),log_every=5", SoapConfig(adam_modules="(lm_head|wte)", log_every=5)),
        (r"adam_modules=h\.[0,1]\.attn", SoapConfig(adam_modules=r"h\.[0,1]\.attn")),
        (r"adam_modules=a=b{1,2}", SoapConfig(adam_modules="a=b{1,2}")),
        ("lora_sides=none", SoapConfig(lora_sides="none")),
    ],
)
def test_what_optim_args_can_say(text: str | None, config: SoapConfig) -> None:
    assert parse_optim_args(text, SoapConfig) == config


def test_a_preset_sets_several_options_and_the_rest_of_the_text_changes_them() -> None:
    config = parse_optim_args("preset=small,beta2=0.8", SoapConfig, {"eps": 1e-6})
    assert config == SoapConfig.preset("small", beta2=0.8, eps=1e-6)
    assert (config.state_dtype, config.beta2, config.eps) == ("bfloat16", 0.8, 1e-6)
    assert parse_optim_args(config.to_optim_args(), SoapConfig) == config
    assert parse_optim_args({"preset": "official"}, SoapConfig).max_aspect_ratio is None


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("preset=smal", SoapConfig, r"soap got preset='smal', wanted one that it has: did you mean small\? its pres"),
        ("preset=small", MarsConfig, r"mars got preset='small', wanted one that it has: its presets are frontier"),
        (
            "preset=small",
            MarsLionConfig,
            r"mars_lion got preset='small', wanted one that it has: its presets are none",
        ),
        ("preset=small,preset=official", SoapConfig, r"optim_args got preset twice"),
    ],
)
def test_presets_that_do_not_exist(text: str, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_optim_args(text, config)


def test_the_table_of_presets_says_what_they_set() -> None:
    _, _, *rows = preset_table(SoapConfig).splitlines()
    for row in rows:
        name, *changes = row.split("`")[1::2]
        assert parse_optim_args(",".join(changes), SoapConfig) == SoapConfig.preset(name)
    assert len(rows) == len(SoapConfig.presets)
    assert preset_table(MarsLionConfig) == ""


def test_a_preset_comes_before_arguments_of_the_trainer_and_after_the_text() -> None:
    given = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
    config = parse_optim_args("preset=frontier,beta1=0.7", SoapConfig, given)
    assert (config.beta1, config.beta2, config.eps) == (0.7, 0.9, 1e-6)


def test_modules_of_a_preset_are_changed_by_pattern() -> None:
    text = "preset=frontier,modules={wte: {lr_factor: 2}, '@vectors': {lr_factor: 0.5, beta2: 0.99}}"
    modules = parse_optim_args(text, SoapConfig).modules
    adam = {"rule": "adam", "beta1": 0.9, "beta2": 0.95}
    assert modules is not None
    assert list(modules) == ["wte", "@vectors", "@embeddings", "@head"]  # the first match wins
    assert modules["wte"] == {"lr_factor": 2}
    assert modules["@vectors"] == {**adam, "lr_factor": 0.5, "beta2": 0.99}
    assert modules["@embeddings"] == modules["@head"] == adam
    assert parse_optim_args("preset=frontier,modules=none", SoapConfig).modules is None


@pytest.mark.parametrize("value", ["abc", "{wte: 3}", "{'@vectors': 3}"])
def test_modules_beside_a_preset_are_checked_as_they_are_alone(value: str) -> None:
    messages = []
    for text in (f"modules={value}", f"preset=frontier,modules={value}"):
        with pytest.raises(ValueError, match="modules must") as error:
            parse_optim_args(text, SoapConfig)
        messages.append(str(error.value).partition(" got ")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", SoapConfig.presets)
@pytest.mark.parametrize("config", [SoapConfig, KlSoapConfig])
def test_presets_are_valid(config: type[SoapConfig], name: str) -> None:
    preset = config.preset(name)
    assert all(getattr(preset, key) == value for key, value in config.presets[name].items())


def test_defaults_may_come_from_elsewhere_and_yield_to_the_text() -> None:
    config = parse_optim_args("beta1=0.5", SoapConfig, {"beta1": 0.6, "beta2": 0.7})
    assert (config.beta1, config.beta2) == (0.5, 0.7)
    with pytest.raises(ValueError, match=r"beta2 must be in \[0, 1\), got 1"):
        parse_optim_args("", SoapConfig, {"beta2": 1.0})


@entries
@pytest.mark.parametrize("value", [0.125, 1e-12, 3, True, False, None, "rank", "off", "a|b", {"a,b": {"lr": 1}}])
def test_a_config_survives_being_written_as_text(entry: Entry, value: Any) -> None:
    """Every option that can be set to the value is."""
    config = entry.config()
    for name in option_fields(entry.config):
        with contextlib.suppress(ValueError):
            config = replace(config, **{name: value})
    assert parse_optim_args(config.to_optim_args(), entry.config) == config


@pytest.mark.parametrize(
    "pattern",
    [
        r"lm_head|wte",
        r"h\.[01]\.",
        r"(a|b)\d{1,3}",
        "x=y",
        r"foo\(",
        "a,b",
        "[(]",
        " a",
        "none",
        "",
        "'a'",
        '"',
        "x=,'",
    ],
)
def test_a_pattern_survives_being_written_as_text(pattern: str) -> None:
    """SoapTrainer writes its config into optim_args; a comma or a bracket of a pattern cut the text elsewhere."""
    config = SoapConfig(adam_modules=pattern, eps=1e-6)
    assert parse_optim_args(config.to_optim_args(), SoapConfig) == config


BY_MODULE: dict[str, Any] = {
    "modules={wte: {lr: 1e-2}}": {"wte": {"lr": 1e-2}},
    r"modules={'wte|lm_head': {rule: adam, lr: 1e-2}, '\.mlp\.': {one_sided: true, beta2: 0.9}},eps=1e-6": {
        "wte|lm_head": {"rule": "adam", "lr": 1e-2},
        r"\.mlp\.": {"one_sided": True, "beta2": 0.9},
    },
    '{"@vectors": {"lr_factor": 2, "block_size": null}}': {"@vectors": {"lr_factor": 2, "block_size": None}},
    "modules='{h: {block_size: none, merge_dims: yes, weight_decay: \"0\"}}'": {
        "h": {"block_size": None, "merge_dims": True, "weight_decay": 0.0}
    },
    r"""modules={'[(,{]\''': {}, "\\d{1,2}": {}, a'b: {}, '': {}}""": {
        r"[(,{]\'": {},
        r"\d{1,2}": {},
        "a'b": {},
        "": {},
    },
    "modules={}": {},
    "modules=none": None,
}
"""What is written, and what it says."""


@pytest.mark.parametrize(("text", "given"), BY_MODULE.items(), ids=BY_MODULE.keys())
def test_settings_by_module_are_read_and_written(text: str, given: Any) -> None:
    text = text if "modules=" in text else f"modules={text}"
    found, eps = parse_optim_args(text, SoapConfig), 1e-6 if "eps" in text else 1e-8
    assert found == SoapConfig(modules=given, eps=eps)
    assert found.modules is None or list(found.modules) == list(given)
    assert parse_optim_args(found.to_optim_args(), SoapConfig) == found
    assert parse_optim_args({"modules": given, "eps": eps}, SoapConfig) == found
    assert parse_optim_args([found.to_optim_args(), "one_sided=true"], SoapConfig) == replace(found, one_sided=True)
    assert patterns(found.to_optim_args()) == [key for key in given or {} if key[:1] != "@"]
    assert hash(found) == hash(SoapConfig(modules=given, eps=eps))


@pytest.mark.parametrize(
    "pattern",
    ["a" * 200, "é\\.", "a: b", "# a", "a #b", "- a", "a? b", "true", "1e3", "~", "\x7f", "\n \n", "%", "x, {y"],
)
def test_any_pattern_may_have_settings(pattern: str) -> None:
    config = SoapConfig(modules={pattern: {"rule": "adam"}, "b": {"lr": 1e-8}}, eps=1e-6)
    assert parse_optim_args(config.to_optim_args(), SoapConfig) == config


def test_settings_by_module_are_copied() -> None:
    """A config is a value."""
    given = {"a": {"lr": 1.0}}
    config = SoapConfig(modules=given)
    given["a"]["lr"] = -1.0
    assert config.modules == {"a": {"lr": 1.0}}


WRONG_BY_MODULE = {
    "{a: 3}": r"modules must map patterns to settings, got {'a': 3}; for example {'wte\|lm_head': {rule: adam, ",
    "abc": r"modules must be mapping or none, got 'abc'",
    "{a: {lr: 1}": r"modules got '{a: {lr: 1},eps=1e-6', wanted plain YAML: .*column \d+\); write ",
    "{a[0]: {lr: 1}}": r"wanted plain YAML: .*got '\['.*write patterns and roles in single quotes",
    "{@head: {lr: 1}}": r"character '@' that cannot start any token.*write patterns and roles in single quotes",
    "{a: {lr: 1}, a: {lr: 2}}": r"got the key 'a' twice, wanted it once",
    "{a: {lr: 1, lr: 2}}": r"got the key 'lr' twice, wanted it once",
    "{a: {lr: &x 1}, b: {lr: *x}}": r"got an anchor or alias, wanted every value written out",
    "{1: {lr: 1}}": r"got the key '1', wanted text as key",
    "{(: {lr: 1}}": r"a key of modules must be a regular expression, got '\(': ",
    "{'@heads': {lr: 1}}": r"modules got the unknown role '@heads', wanted a pattern or one of @embeddings, @head, ",
    "{a: {freq: 1}}": r"modules, 'a': unknown setting 'freq': did you mean precondition_frequency\? It takes rule",
    "{a: {shard_mode: owner}}": r"'a': got shard_mode, wanted a setting that may differ .*; set shard_mode outside",
    "{a: {log_every: 3}}": r"'a': got log_every, wanted a setting that may differ .*; set log_every outside",
    "{a: {modules: none}}": r"'a': got modules, wanted a setting that may differ between parameters",
    "{a: {lr: 1, lr_factor: 2}}": r"'a': got lr and lr_factor, wanted one of them; lr is absolute",
    "{a: {lr: 0}}": r"'a': lr must be a finite number > 0, got 0",
    "{a: {lr_factor: .nan}}": r"'a': lr_factor must be a finite number > 0, got nan",
    "{a: {weight_decay: -1}}": r"'a': weight_decay must be a finite number >= 0, got -1",
    "{a: {lr: fast}}": r"lr must be float, got 'fast'",
    "{a: {beta1: 1.0}}": r"'a': beta1 must be in \[0, 1\), got 1.0; the default is 0.95",
    "{a: {block_size: 1.5}}": r"'a': block_size must be int or none, got 1.5",
}


@pytest.mark.parametrize(("value", "message"), WRONG_BY_MODULE.items(), ids=WRONG_BY_MODULE.keys())
def test_wrong_settings_by_module(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_optim_args(f"modules={value},eps=1e-6", SoapConfig)


def test_a_separate_learning_rate_is_not_set_by_module() -> None:
    with pytest.raises(ValueError, match=r"'a': got lr_1d, wanted a setting that may differ .*; write lr$"):
        parse_optim_args("modules={a: {lr_1d: 1e-3}}", ENTRIES["muon"].config)


@entries
def test_only_changes_are_written(entry: Entry) -> None:
    assert entry.config().to_optim_args() == ""
    assert entry.config(log_every=7).to_optim_args() == "log_every=7"


@pytest.mark.parametrize("optimizer", [SOAP, Shampoo, MARS])
def test_defaults_are_those_of_the_class(optimizer: type) -> None:
    """The signature and the schema both state the defaults; a change of one must not pass alone."""
    signature = inspect.signature(optimizer).parameters.values()
    stated = {entry.name: entry.default for entry in signature if entry.default is not entry.empty}
    first, *others = [entry.config for entry in ENTRIES.values() if entry.optimizer is optimizer]
    known: set[str] = set()
    for config in (first, *others):
        kwargs = config().constructor_kwargs()
        known |= kwargs.keys()
        differ = {name for name, value in kwargs.items() if value != stated[name]}
        assert differ <= (set() if config is first else {"variant", "kl", "graft"}), "what names stand for"
    of_torch = {"maximize", "foreach", "fused", "differentiable"}  # for programs that treat all optimizers alike
    assert stated.keys() - known == {"lr", "weight_decay", *of_torch}
    assert stated["lr"] == first.lr


@entries
def test_the_table_has_every_option(entry: Entry) -> None:
    heading, line, *table = option_table(entry.config).splitlines()
    assert heading.count("|") == line.count("|") == 5
    rows = {row.split("`")[1]: row for row in table}
    assert len(rows) == len(table)
    assert rows.keys() == option_fields(entry.config).keys()
    for name, field in option_fields(entry.config).items():
        assert rows[name].replace("\\|", "").count("|") == 5
        assert f"`{'none' if field.default is None else str(field.default)}`".lower() in rows[name].lower()
        assert field.metadata["help"] in rows[name]
        if field.metadata["check"]:
            assert field.metadata["check"][1] in rows[name]


@entries
def test_a_config_is_a_value(entry: Entry) -> None:
    config: OptimizerConfig = entry.config()
    with pytest.raises(FrozenInstanceError):
        config.eps = 1.0  # type: ignore[misc, attr-defined]
    assert config == entry.config()
    assert hash(config) == hash(entry.config())


# ---------------------------------------------------------------------------------------------------------------------
# No option is passed over
# ---------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Flat, square and stacked matrices, a vector, a convolution, and the two matrices of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.lora_A, self.lora_B = nn.Linear(36, 36), nn.Linear(12, 2), nn.Linear(2, 12)
        self.flat, self.conv = nn.Linear(3, 60, bias=False), nn.Conv2d(3, 4, 2)
        self.experts = Parameter(torch.ones(2, 6, 6))


READ_BY_THE_STEP = ("nonfinite", "max_skipped_in_a_row", "shard_mode", "average_horizon", "average_start")
"""Read from the group for all parameters at once, by every optimizer alike."""

TOGETHER: tuple[dict[str, Any], ...] = (
    {},
    {"optimize_1d": True},
    {"asynchronous": True, "precondition_frequency": 20},
    {"adam_modules": "head"},
    {"average_horizon": 10},
)
"""Settings some of which each option wants beside it: no parameter may be left that it is for."""

CANDIDATES = (True, False, 3, 0.5, -0.5, "head", "none", None, {"head": {"rule": "adam"}})
EVERY_OPTION = sorted({name for entry in ENTRIES.values() for name in option_fields(entry.config)})


def other_values(name: str) -> list[Any]:
    """Values of an option that are not its default, of the configs that have it."""
    found = []
    for entry in ENTRIES.values():
        if (field := option_fields(entry.config).get(name)) is not None:
            kind = typing.get_type_hints(entry.config)[name]
            choices = [each for part in (kind, *typing.get_args(kind)) for each in typing.get_args(part)]
            for value in (*CANDIDATES, *(each for each in choices if isinstance(each, str))):
                with contextlib.suppress(ValueError):
                    entry.config(**{name: value})
                    if value != field.default:
                        found.append(value)
    return found


def effects(config: OptimizerConfig) -> Any:
    """What an optimizer is going to do with each parameter."""
    net = Net()
    optimizer = build(net, net.parameters(), config)
    group = optimizer.param_groups[0]
    plans = [optimizer.plan_of(member.settings, member.param) for member in optimizer.members()]
    of_step = [group[name] for name in READ_BY_THE_STEP]
    return plans, [optimizer.rates(group, plan) for plan in plans], of_step, getattr(config, "log_every", 0)


@pytest.mark.parametrize("option", EVERY_OPTION)
@entries
def test_an_option_has_an_effect_or_is_refused(entry: Entry, option: str) -> None:
    """MARS(variant="lion", block_size=4) and optim_args="pack_factors=true" of mars trained as if nothing was said."""
    value, *others = other_values(option)
    if option not in option_fields(entry.config):
        with pytest.raises(ValueError, match=f"unknown option '{option}' of {entry.config.name}"):
            parse_optim_args({option: value}, entry.config)
        with pytest.raises((TypeError, ValueError), match=option):
            entry.optimizer([Parameter(torch.ones(2, 2))], **constructor_kwargs(entry.config, option, value))
        return
    refused = True
    for beside, given in itertools.product(TOGETHER, (value, *others)):
        with contextlib.suppress(TypeError, ValueError):
            without, together = entry.config(**beside), entry.config(**{**beside, option: given})
            if effects(without) != effects(together):
                return
            refused = refused and getattr(without, option) == given
    assert refused


def constructor_kwargs(config: type[OptimizerConfig], option: str, value: Any) -> dict[str, Any]:
    kwargs = config().constructor_kwargs()
    return {
        **kwargs,
        **({"betas": (kwargs["betas"][0], value)} if option == "beta2" and "betas" in kwargs else {option: value}),
    }


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo", "m"])
def test_an_ignored_option_says_who_reads_it(variant: Any) -> None:
    params = [Parameter(torch.ones(2, 2))]
    message = (
        rf"variant='{variant}' got block_size=4, wanted only options that it reads; remove block_size, "
        r"or use variant='soap'"
    )
    with pytest.raises(ValueError, match=message):
        MARS(params, variant=variant, block_size=4)
    with pytest.raises(ValueError, match=message):
        MARS([{"params": params, "block_size": 4}], variant=variant)
    with pytest.raises(ValueError, match=message):
        MARS([{"params": params, "overrides": [{"block_size": 4}]}], variant=variant)
    MARS(params, variant=variant, block_size=None, precondition_frequency=10)
    MARS([{"params": params, "variant": "soap", "block_size": 4}], variant=variant)


def test_a_group_has_the_variant_that_it_says() -> None:
    """It was accepted, and the optimizer's own variant went on."""
    optimizer = MARS([{"params": [Parameter(torch.ones(2, 2))], "variant": "lion"}])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    assert "exp_avg_sq" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    with pytest.raises(ValueError, match="overrides of a param group got variant"):
        MARS([{"params": [Parameter(torch.ones(2, 2))], "overrides": [{"variant": "lion"}]}])
    with pytest.raises(ValueError, match="variant must be one of adamw, lion, shampoo, m, soap, got 'muon'"):
        MARS([Parameter(torch.ones(2, 2))], variant="muon")  # type: ignore[arg-type]


def test_lion_reads_one_beta() -> None:
    config: Any = ENTRIES["mars_lion"].config
    with pytest.raises(ValueError, match=r"mars_lion got betas='\(0.9,0.95\)', wanted beta1 alone: .*write beta1=0.9"):
        parse_optim_args("betas=(0.9,0.95)", config)
    with pytest.raises(ValueError, match=r"variant='lion' got beta2=0.5, wanted .*use variant='adamw' or 'shampoo'"):
        MARS([Parameter(torch.ones(2, 2))], variant="lion", betas=(0.9, 0.5))
    assert config(beta1=0.5).constructor_kwargs()["betas"] == (0.5, 0.99)


def test_nearest() -> None:
    assert nearest("sop", ["soap", "mars"]) == "did you mean soap? "
    assert nearest("quite different", ["soap", "mars"]) == ""

"""Recipes: what is read and refused, and what becomes of it on a command line."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import tiny
from generated import cases
from hypothesis import given
from hypothesis import strategies as st
from recipe_texts import VALID, read
from transformers import HfArgumentParser, TrainingArguments

from hf_soap.config import plain_yaml
from hf_soap.hub import keys, recipes
from hf_soap.hub.arguments import resolve

# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------


def test_a_valid_recipe() -> None:
    """``no`` was a boolean and ``3e-3`` text to the YAML of version 1.1, which the Trainer takes neither of."""
    recipe = read(VALID)
    assert recipe["eval_strategy"] == "no"
    assert recipe["learning_rate"] == 3e-3
    recipes.check(recipe, source="the file")


names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,20}", fullmatch=True).filter(lambda key: key != "provenance")
texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp", "Zs"), include_characters=" ")),
    st.sampled_from(
        ["no", "on", "null", "~", "1e-3", "0x1f", "0o17", "1_000", "12:30", "2026-01-01", ".inf", "<<", "="]
    ),
)
numbers = st.one_of(st.integers(-(10**12), 10**12), st.floats(-1e12, 1e12))
scalars = st.one_of(st.booleans(), numbers, texts)
flat = st.dictionaries(names, st.one_of(scalars, st.lists(scalars, min_size=1, max_size=3)), max_size=6)


@given(flat, st.recursive(scalars, lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=5))
@cases()
def test_yaml_round_trip(options: dict[str, Any], provenance: Any) -> None:
    recipe = {**options, "provenance": {"ran": provenance}}
    back = plain_yaml.load(recipes.dump(recipe).encode())
    assert back == recipe
    assert repr(back) == repr(recipe)  # True is not 1, and 1 not 1.0
    assert plain_yaml.load(recipes.embedded(f"# A card\n\n{recipes.embed(recipe)}\n\nMore\n".encode())) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1e-3) for text in ("1e-3", "1E-3", "1.0e-3", "+1e-3", "0.001", ".001")),
        ("5.", 5.0),
        ("1e3", 1000.0),
        ("-12", -12),
        ("0", 0),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, None) for text in ("null", "~", "")),
        # YAML 1.1 reads these as booleans, octal, hexadecimal and sexagesimal numbers, and dates.
        *((text, text) for text in ("yes", "no", "on", "off", "Y", "n", "010", "0x1F", "0b1", "1_000", "12:30")),
        *((text, text) for text in ("2026-01-01", "2026-01-01T12:30:00Z", "main", "1.2.3", "e3", "1e")),
        ("'1e-3'", "1e-3"),
        ("'true'", "true"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    """PyYAML's own loader reads `learning_rate: 1e-3` as text and `eval_strategy: no` as false."""
    (read_back,) = plain_yaml.load(f"a: {text}".encode()).values()
    assert (type(read_back), read_back) == (type(value), value)


@given(flat)
@cases()
def test_command_line_round_trip(options: dict[str, Any]) -> None:
    """What was read from a command line gives the same command line."""
    named = {key: value for key, value in options.items() if key not in keys.SCRIPT_KEYS}
    first = recipes.from_arguments(recipes.to_arguments(named))
    assert recipes.from_arguments(recipes.to_arguments(first)) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['touch owned']", "got the tag 'tag:yaml.org,2002:python/object/apply"),
        ("a: !!str 1", "got the tag"),
        ("a: ! b", "got the tag"),
        ("a: &x [1]\nb: *x", r"anchor or alias, wanted every value written out \(line 1, column 4\)"),
        ("a: 1\nb: *x", r"anchor or alias, .* \(line 2, column 4\)"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]", "anchor or alias"),
        ("seed: 1\nseed: 2", r"got the key 'seed' twice, wanted it once \(line 2, column 1\)"),
        ("provenance: {a: 1, a: 2}", "got the key 'a' twice"),
        ("1: 2", "got the key '1', wanted text as key"),
        ("[a]: 2", "wanted text as key"),
        ("a: " + "[" * 50_000, "deeper nesting"),
        ("a: " + "9" * 5000, "limit"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: [", "wanted plain YAML"),
        ("a: \x1b[31m", "wanted plain YAML"),
        ("#" + "x" * plain_yaml.MAX_BYTES, "wanted at most 65536"),
        ("- a", "wanted option names and values"),
        ("", "wanted option names and values"),
        ("a: \xff".encode("latin-1"), "wanted plain YAML"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_yaml_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        recipes.read(text.encode() if isinstance(text, str) else text, source="user/model")
    assert str(error.value).startswith("user/model: ")
    assert len(str(error.value)) < 1000


# ---------------------------------------------------------------------------------------------------------------------
# What no recipe may hold
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (f"{key}: x", "a secret")
            for key in ("token", "hub_token", "HF_TOKEN", "use_auth_token", "azure_key", "my_pw")
        ),
        *((f"{key}: true", "third-party code") for key in ("trust_remote_code", "custom_code", "auto_map")),
        *(
            (f"{key}: x", "one machine or account")
            for key in ("push_to_hub", "hub_model_id", "deepspeed", "resume_from_checkpoint", "trackio_space_id")
        ),
        ("provenance: {log: 'see hf_abcdefghijklmnopqrstuvwxyz'}", "an access token"),
        ("run_name: hf_abcdefghijklmnopqrstuvwxyz", "an access token"),
        *(
            (f"{key}: {path}", "wanted a path below the working folder")
            for key in ("output_dir", "logging_dir", "train_files", "model_name_or_path", "anything")
            for path in ("/etc/passwd", "../up", "a/../../b", "~/x", r"C:\x", r"..\x", "[ok, /no]", "stdlib:../x")
        ),
        ("output_dir: .git/hooks", "wanted no hidden file or folder"),
        ("train_files: [a/.env]", "wanted no hidden file or folder"),
        ("train_files: data.pkl", "wanted no pickle"),
        ("model_name_or_path: weights.bin", "wanted no pickle"),
        ("attn_implementation: somebody/kernel", "built-in implementation"),
        ("attn_implementation: 'somebody/kernel@v1:attention'", "built-in implementation"),
        ("config_overrides: _attn_implementation=somebody/kernel", "wanted name=value pairs"),
        ("config_overrides: a=somebody/kernel", "wanted name=value pairs"),
        ("""lr_scheduler_kwargs: '{"trust_remote_code": true}'""", "'trust_remote_code': refused"),
        ("""dataset_kwargs: '{"a": [{"token": "x"}]}'""", "'token': refused"),
        ("""dataset_kwargs: '{"file": "../x"}'""", "below the working folder"),
        ("""dataset_kwargs: '{"a": 1e400}'""", "wanted a number between"),
        ("""dataset_kwargs: '{"a": NaN}'""", "wanted a number between"),
        ("""dataset_kwargs: '{"a"'""", "wanted a JSON object"),
        ("dataset_kwargs: '" + '{"a":' * 500 + "'", "more than 50 levels or entries"),
        ("seed: 1000000000000000", "wanted a number between"),
        ("seed: .inf", "wanted a number between"),
        ("seed: .nan", "wanted a number between"),
        ("seed: 1e999", "wanted a number between"),
        ("provenance: {results: {loss: .nan}}", "wanted a finite number"),
        ("seed:", "got null, wanted a value; omit the key"),
        ("train_files: []", "got an empty list"),
        ("train_files: [a, --push_to_hub]", "would read as an option"),
        ("seed: {a: 1}", "got a nested value"),
        ("train_files: [[a]]", "got a nested value"),
        (r'run_name: "a\nb"', "printable characters"),
        (r'run_name: "\e[2J"', "printable characters"),
        (r'provenance: {"\e[2J": 1}', "printable characters"),
        (r'"\e[2J": 1', r"^the file is refused\n- '\\x1b\[2J': wanted a name"),
        ("--seed: 1", "wanted a name of letters"),
        ("seed=1 --bf16: 1", "wanted a name of letters"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_content_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


def test_all_that_is_refused_is_named() -> None:
    with pytest.raises(ValueError, match=r"(?s)is refused\n- token: .*\n- output_dir: .*") as error:
        read("token: x\nseed: 1\noutput_dir: /tmp/x")
    assert "seed" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What the Trainer would not take
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat: unknown key; did you mean learning_rate?"),
        ("trust_remote_cod: true", "trust_remote_cod: unknown key"),
        ("block_sise: 1", "did you mean block_size?"),
        ("optim: soop", "optim: got 'soop', wanted one of .*soap.*; did you mean soap?"),
        ("lr_scheduler_type: cosin", "did you mean cosine?"),
        ("bf16: yes", "bf16: got 'yes', wanted true or false"),
        ("bf16: 1", "bf16: got 1, wanted true or false"),
        ("max_steps: 1.5", "max_steps: got 1.5, wanted a whole number"),
        ("max_steps: true", "max_steps: got True, wanted a whole number"),
        ("learning_rate: fast", "learning_rate: got 'fast', wanted a number"),
        ("model_revision: 12", "model_revision: got 12, wanted text; put it in quotes"),
        ("lr_scheduler_kwargs: file.json", "wanted a JSON object as text"),
        ("learning_rate: -1", "learning_rate: got -1, wanted 0 to 1000"),
        ("adam_beta1: 1.5", "wanted 0 to 1"),
        ("per_device_train_batch_size: 0", "wanted 1 to"),
        ("dataloader_num_workers: 100000", "wanted 0 to 256"),
        ("seed: 4294967296", "wanted 0 to 4.29497e"),
        ("optim: soap\noptim_args: precondition_frequency=0", "precondition_frequency must be >= 1, got 0"),
        ("optim: soap\noptim_args: precondition_freq=2", "did you mean precondition_frequency?"),
        ("optim: shampoo\noptim_args: refresh_tol=1", "unknown option 'refresh_tol' of shampoo"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    recipe = read(text)
    with pytest.raises(ValueError, match=message):
        recipes.check(recipe, source="the file")


def test_a_key_may_be_allowed_but_not_a_refused_one() -> None:
    recipes.check(read("my_option: 3"), source="the file", allowed=["my_option"])
    recipes.check(read("eos_token: <eos>\ntrain_files: ./a.txt\ndataset_config: 20231101.pt"), source="the file")
    with pytest.raises(ValueError, match="wanted a whole number"):
        recipes.check(read("max_steps: x"), source="the file", allowed=["max_steps"])


def test_every_script_key_is_no_field_of_the_trainer() -> None:
    assert not keys.SCRIPT_KEYS.keys() & TrainingArguments.__dataclass_fields__.keys()
    assert not [key for key in keys.SCRIPT_KEYS if keys.problem_of_key(key)]
    assert keys.RANGES.keys() - keys.key_types().keys() <= {"warmup_ratio"}  # a field in transformers 4 alone


# ---------------------------------------------------------------------------------------------------------------------
# From and to training arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> TrainingArguments:
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
    assert isinstance(parsed, TrainingArguments)
    return parsed


def test_default_arguments_make_an_empty_recipe(tmp_path: Path) -> None:
    assert recipes.from_training_arguments(TrainingArguments(str(tmp_path))) == {}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_arguments_come_back_through_a_recipe_and_a_command_line(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "optim_args": "betas=(0.9,0.95),adam_modules=a|b",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "learning_rate": 1 / 3,
        "average_tokens_across_devices": False,
        "gradient_checkpointing": True,
        "data_seed": 0,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "label_names": ["labels", "more"],
        "accelerator_config": {"split_batches": True},
        "push_to_hub": False,
        "hub_model_id": "user/model",
        "logging_steps": 3,
        "run_name": "mine",
    }
    args = tiny.arguments(tmp_path, **changes)
    recipe = recipes.from_training_arguments(args)
    assert not {"output_dir", "hub_model_id", "run_name", "report_to"} & recipe.keys()
    recipes.check(recipe, source="the file")
    back = parse(recipes.to_arguments(read(recipes.dump(recipe))))
    assert recipes.from_training_arguments(back) == recipe
    local = {"output_dir", "hub_model_id", "run_name", "logging_dir", "disable_tqdm"}
    want, got = ({key: value for key, value in each.to_dict().items() if key not in local} for each in (args, back))
    assert got == want
    assert back.learning_rate == 1 / 3
    assert back.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize("optim", ["soap", "adafactor"])
def test_a_recipe_holds_the_options_of_a_preset(optim: str, tmp_path: Path) -> None:
    """So that a later version of the preset does not change the run; adam_beta2 is not an option of the preset."""
    given = "modules={wte: {lr_factor: 2}},preset=frontier"
    args = tiny.arguments(tmp_path, optim=optim, optim_args=given if optim == "soap" else "preset=1", adam_beta2=0.7)
    recipe, _ = recipes.of_run(args)
    if optim != "soap":
        assert recipe["optim_args"] == "preset=1"
        return
    assert "preset" not in recipe["optim_args"]
    assert resolve(parse(recipes.to_arguments(recipe))) == resolve(args)
    assert resolve(args).beta2 == 0.9
    recipes.check(recipe, source="the run")


def test_options_of_the_program_join_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = "folder/train.py data.json --train_files a.txt b.txt --lora-r=8 --tokenizer_name 7 --streaming --my 1e-3"
    command += " --no_keep_linebreaks --eval_share -1 --learning_rate 9 --no_average_tokens_across_devices"
    command += " --validation_file /mine.txt --hub_token abc -x 3"
    monkeypatch.setattr(recipes, "LAUNCH", None)
    recipes.remember(command.split())
    assert recipes.Launch("train.py", tuple(command.split()[1:])) == recipes.LAUNCH
    recipe, left_out = recipes.of_run(tiny.arguments(tmp_path))
    assert recipe["learning_rate"] == 3e-3, "the arguments know better than the command line"
    options = {key: value for key, value in recipe.items() if key not in TrainingArguments.__dataclass_fields__}
    assert options == {
        "train_files": ["a.txt", "b.txt"],
        "lora_r": 8,
        "tokenizer_name": "7",
        "streaming": True,
        "my": "1e-3",
        "keep_linebreaks": False,
        "eval_share": -1.0,
    }
    assert left_out == ["validation_file"]
    assert "omitted from the recipe: validation_file: got '/mine.txt', wanted a path below" in caplog.text


def test_options_in_a_file_are_options_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from a file of options had none of the model and the data in its recipe, and the card said nothing."""
    monkeypatch.chdir(tmp_path)
    options = "model_type: gpt2\nlora_r: 8\nseed: 3\nlr_scheduler_kwargs: {min_lr: 1}\ntokenizer_name: null\n"
    Path("options.yaml").write_text(options)
    Path("data.json").write_text('{"text": "no options"}')
    launch = recipes.Launch("run_clm.py", ("options.yaml", "--lora_r", "4", "--streaming"))
    args = tiny.arguments(tmp_path)
    want = {"model_type": "gpt2", "lora_r": 4, "seed": 3, "lr_scheduler_kwargs": '{"min_lr": 1}', "streaming": True}
    assert recipes.options_of_launch(launch, args) == (want, [])
    for arguments in (["data.json", "--seed", "3"], ["--seed", "3", "-x"], ["--seed", "3", "--", "data.json"]):
        given, lacking = recipes.options_of_launch(recipes.Launch("train.py", tuple(arguments)), args)
        assert given["seed"] == 3
        assert lacking == ["arguments of the program that are not options with a long name"]


def test_a_script_of_a_package_is_started_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trl sft` starts a file inside of TRL, and the card told the reader to run sft.py, which is in no folder."""
    monkeypatch.setattr(recipes, "LAUNCH", None)
    installed = Path(sysconfig.get_path("purelib"))
    for argv, module, program in (
        ([str(installed / "trl" / "scripts" / "sft.py"), "--seed"], False, "-m trl.scripts.sft"),
        (["trl.scripts.sft", "--seed"], True, "-m trl.scripts.sft"),
        (["folder/sft.py", "--seed"], False, "sft.py"),
        (["trl", "--seed"], False, "trl"),
    ):
        recipes.remember(argv, module=module)
        assert recipes.Launch(program, ("--seed",)) == recipes.LAUNCH

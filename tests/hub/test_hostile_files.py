"""Recipes and model cards of somebody who means harm, and folders that hold more than a recipe."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from generated import cases
from hypothesis import example, given
from hypothesis import strategies as st
from paths import ROOT
from typer.testing import CliRunner

from hf_soap.__main__ import app
from hf_soap.cli.run import with_recipe
from hf_soap.config import options, plain_yaml
from hf_soap.config.configs import SoapConfig
from hf_soap.config.options import parse_optim_args
from hf_soap.hub import exchange, keys, recipes, safety


def read(data: bytes | str) -> tuple[Any, str]:
    """A recipe, or None and why not; anything else than a ValueError of a line or some is an error of ours."""
    try:
        return recipes.read(
            data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"), source="it"
        ), ""
    except ValueError as error:
        return None, str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Any text at all
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
PIECES = [
    *("a: ", "b: ", "optim_args: ", "seed: ", "? ", "- ", "\n", "\n  ", "{", "}", "[", "]", ",", ": ", "'", '"'),
    *("|\n ", ">-\n ", "&x ", "*x", "!!python/object/apply:os.system ", "!x!y ", "%YAML 1.1\n---\n", "---\n"),
    *("%TAG ! x:\n---\n", "...\n", "<<: ", "1e400", ".inf", ".nan", "0x1F", "9" * 40, "-", "~", "null", "true"),
    *("#", "\t", "\r", "\x85", "\u2028", r'"\UFFFFFFFF"', r'"\x1b[31m"', r'"\ud800"', "\ufeff", "\x00", "\x1b"),
    *("é", "../x", "/etc", "C:x", '{"a":'),
]
# fmt: on
soup = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
documents = st.one_of(st.binary(max_size=60), st.text(max_size=60), soup, soup.map(lambda text: text.encode("utf-16")))


def is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 9 and all(type(key) is str and is_plain(inner, depth + 1) for key, inner in value.items())
    if isinstance(value, list):
        return depth < 9 and all(is_plain(inner, depth + 1) for inner in value)
    return value is None or type(value) in (str, int, float, bool)


@given(documents)
@example(r'a: "\UFFFFFFFF"')  # an OverflowError
@example("? " * 30_000)
@example(b"\r")
@example("a: !" + "k" * 60_000 + " 1")  # answered in 60,000 characters
@example(("k" * 900 + ": 1\n") * 2)
@example("train_files: /" + "x" * 60_000)
@example("{" + ",".join(f"k{i}" for i in range(9000)) + "}")  # half a megabyte of complaints
@example('a: "\u202e [x\u202e" [')  # the line itself stood in the error, and turned what followed around
@cases(1.5)
def test_any_text_is_plain_data_or_refused_in_a_few_lines(document: bytes | str) -> None:
    recipe, said = read(document)
    if recipe is None:
        assert said.startswith("it")
        assert len(said) < 10_000
        assert all(line.isprintable() for line in said.splitlines())
    else:
        assert is_plain(recipe)
        assert plain_yaml.load(recipes.dump(recipe).encode()) == recipe
        assert not safety.refusals(recipe)
    card = b"# Mine\n\n" + recipes._MARK.encode() + b"\n```yaml\n"
    body = document if isinstance(document, bytes) else document.encode("utf-8", "surrogatepass")
    assert read_card(card + body + b"\n```\n") in ((body + b"\n").replace(b"\r\n", b"\n"), None)


def read_card(card: bytes) -> bytes | None:
    try:
        return recipes.embedded(card)
    except ValueError:
        return None


values = st.recursive(
    st.one_of(
        st.text(max_size=12), st.integers(), st.floats(), st.booleans(), st.none(), st.sampled_from(PIECES),
        st.sampled_from(["../a", "file:///etc/passwd", "a\\..\\b", "(a+)+$", "\x1b[2J", "[/red]", "hf_" + "a" * 30]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip
some_keys = st.one_of(
    st.sampled_from(
        sorted({*keys.SCRIPT_KEYS, "optim", "optim_args", "report_to", "provenance", "output_dir", "seed"})
    ),
    st.sampled_from(["trust_remote_code", "push_to_hub_token", "hub_token", "deepspeed", "fsdp_config", "a.b", ""]),
    st.text(max_size=8),
)


@given(st.dictionaries(some_keys, values, max_size=4), st.sampled_from(["optim_args", "x"]))
@cases(1.2)
def test_any_content_is_a_recipe_or_refused_by_key(content: dict[str, Any], key: str) -> None:
    """What passes holds no path out of the folder, no address, no control character, and fits a command line."""
    problems = safety.refusals(content)
    named = [line for line in problems if line]
    assert len(named) <= len(content) + 1
    assert all(len(line) < 600 and line.isprintable() for line in named)
    if problems:
        return
    mistakes = keys.mistakes(content)
    assert all(len(line) < 1200 for line in mistakes)
    for argument in recipes.to_arguments(content):
        assert argument.isprintable()
        assert ".." not in argument.replace("=", "/").split("/") or argument.startswith("--optim_args")
    json.dumps(content, allow_nan=False)
    assert recipes.read(recipes.dump(content).encode(), source="it") == content if content else True


# ---------------------------------------------------------------------------------------------------------------------
# What is meant to do harm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        # `file:` led anywhere on the disk, and an address to whatever answers in the user's network.
        ("train_files: file:///etc/passwd", "train_files: got 'file:///etc/passwd', wanted no URL"),
        ("train_files: [a.txt, 'http://169.254.169.254/latest']", "wanted no URL"),
        ("train_files: zip://a::https://host/x.zip", "wanted no URL"),
        ("""dataset_kwargs: '{"data_files": "file:///etc/passwd"}'""", "wanted no URL"),
        # `file:` needs no slashes to lead anywhere, and fsspec has more such words.
        ("train_files: file:/etc/passwd", "train_files: got 'file:/etc/passwd', wanted no URL"),
        ("train_files: ['local::/etc/passwd']", "wanted no URL"),
        ("train_files: simplecache::/etc/passwd", "wanted no URL"),
        ("train_files: ' file:/etc/passwd'", "wanted no URL"),
        ("train_files: 'data:,x'", "wanted no URL"),
        ("train_files: stdlib::/etc/passwd", "wanted no URL"),
        # All of the run's figures went to an account that the recipe's author chose by a project's name.
        ("report_to: wandb", "report_to: got 'wandb', wanted none or tensorboard"),
        ("report_to: all", "wanted none or tensorboard"),
        ("report_to: [tensorboard, codecarbon]", "got 'codecarbon'"),
        ("optim_target_modules: (a+)+$", "optim_target_modules: .*groups .* that are not repeated"),
        ("lora_target_modules: '((a|b)*c)*d'", "groups .* that are not repeated"),
        ("optim_args: adam_modules=(x*)*y", "optim_args: .*groups .* that are not repeated"),
        ("optim_args: one_sided=true,one_sided_modules='(x*)*y'", "optim_args: .*groups .* that are not repeated"),
        ("optim_args: 'adam_modules=.*a.*b.*c.*d$'", "optim_args: .*at most 3 of"),
        ("optim_args: 'modules={(x*)*y: {lr: 1}}'", "optim_args: .*groups .* that are not repeated"),
        (r"""optim_args: 'modules={"(x\x2a)*y": {}},eps=1e-6'""", "optim_args: .*groups .* that are not repeated"),
        ("optim_args: 'modules={.*a.*b.*c: {}, .*d.*e.*f: {}},adam_modules=.*g.*h$'", "optim_args: .*at most 3 of"),
        ("optim_args: 'modules={a: {lr: 1}'", "optim_args: modules got .*wanted plain YAML"),
        ("optim_args: 'modules={a: &a {lr: 1}, b: *a}'", "an anchor or alias"),
        # Neither was ? taken for a repeat, nor a group that chooses without one; peft reads this key as patterns too.
        ("optim_target_modules: '(.?){26}.{26}!'", "groups .* that are not repeated"),
        (f"optim_target_modules: '{'.?' * 22 + '.' * 22}!'", "at most 3 of"),
        (f"optim_args: 'adam_modules={'(.|.)' * 26}!'", "few alternatives"),
        ("lora_modules_to_save: [lm_head, (a+)+$]", "groups .* that are not repeated"),
        ("optim_target_modules: '(?=(a+)+$)'", "groups .* that are not repeated"),
        (r"optim_target_modules: '(.*)\1\1\1!'", "groups .* that are not repeated"),
        (f"optim_target_modules: [{'.*a.*b.*c.*d,' * 2}]", "at most 3 of"),
        ("optim_target_modules: [.*a.*b.*c, .*d.*e.*f]", "got '.*a.*b.*c|.*d.*e.*f', .*at most 3 of"),
        (f"run_name: {'x' * 5000}", "run_name: got text of 5000 characters"),
        ("\n".join(f"k{i}: 1" for i in range(1001)), "got 1001 keys"),
        (f"train_files: [{'a,' * 1001}]", "got 1001 entries"),
        ("push_to_hub_token: x", "push_to_hub_token: refused, because it is a secret"),
        ("run_name: github_pat_abcdefghijklmnopqrstuv", "an access token"),
        ("run_name: sk-abcdefghijklmnopqrstuv", "an access token"),
    ],
)
def test_harm_is_refused_by_key(text: str, why: str) -> None:
    recipe, said = read(text)
    assert recipe is None
    assert re.search(why, said), said


@pytest.mark.parametrize(
    "text",
    [
        r"optim_args: 'adam_modules=model\.layers\.\d+\.(self_attn|mlp)\.[a-z(+]+_proj,betas=(0.9,0.95)'",
        "report_to: [tensorboard]",
        "lora_target_modules: [q_proj, '.*attn.*']",
        "lora_target_modules: all-linear",
        "optim_args: adam_modules=lm_head|embed",
        "optim_args: \"modules={'lm_head|embed': {rule: adam, lr: 1e-2}, '@vectors': {weight_decay: 0}}\"",
        r"optim_args: adam_modules='.*\.layers\.(0|1|2)\..*'",
        r"optim_args: adam_modules=^model\.(q|k|v)_proj$,one_sided_modules=layers\.[0-9]+\.mlp",
        r"optim_target_modules: .*\.layers\.\w+\.[a-z_]+\.\w+_proj\.lora_A\..*",
        rf"optim_target_modules: .*layers\.({'|'.join(map(str, range(80)))})\.mlp\.(?:gate|up|down)_proj",
        r"optim_target_modules: .*layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\..*lora_[AB].*",
        rf"optim_target_modules: (^|\.)layers\.({'|'.join(map(str, range(32)))})\.mlp\.(gate|up|down)_proj",
        "optim_target_modules: [" + "a.b," * 999 + "]",
        "train_files: [books/*.txt, stdlib:*.py, package:torch/*.py]",
        "my_prompt: 'Question: why? Answer:'",
    ],
)
def test_what_recipes_do_hold_passes(text: str) -> None:
    assert read(text)[0] is not None


pieces = st.sampled_from(
    [".*", ".*?", ".+", ".?", ".", "[a-z._]*", r"\w*", "[^!]*", "[^.]+", ".{0,9}", ".{9}", "e*", "e"]
)
groups = st.sampled_from(
    ["(.|.)", "(e|ex)", "(|.)", "(e|e)", "(.?)", "(a|b)?", "|", "$", "^", r"\b", r"\.", "layers", "!"]
)
NAME = "base_model.model.model.layers.31.block_sparse_moe.experts.127.down_proj.lora_A.default.weight"


def give_up(*_: Any) -> None:
    raise TimeoutError


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a clock of the process's own time")
@given(st.lists(st.one_of(pieces, groups), max_size=16).map("".join), st.sampled_from(["", "!", "[!]"]))
@example("(.|.)" * 40, "!")
@example("(.?){40}.{40}", "!")
@example(".?" * 40 + "." * 40, "!")
@example(r"\b?" * 40, "!")
@example("^?" * 40, "!")
@example("(e|em|emb|embe)" * 40, "!")
@example("a?a" * 40, "!")
@example(r"\x2e?\x2e", "!")
@example("[^]|a]" * 20, "!")
@example("|".join([".*?.*?.*?"] * 300), "!")
@example(r"[^.]+\.?" * 20, "!")
@example(r"[^[0-9]+\.*" * 20, "!")
@example(r"[--z]+\." * 20, "!")
@example(r"\\\d+\.*" * 20, "!")
@example("(?=.*)" * 20, "!")
@example(r"(.*.*.*)\1", "!")
@cases(4)
def test_what_passes_as_a_pattern_is_searched_for_in_bounded_time(start: str, end: str) -> None:
    """Ways through a pattern doubled with each of its groups; the slowest that is found now takes half a second."""
    pattern = start + end
    if safety.refusals({"optim_target_modules": pattern}):
        return
    previous = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, 30)
    try:
        re.search(pattern, NAME)
        re.fullmatch(pattern, NAME)
    except re.error:
        pass  # which ends a run at its start
    except TimeoutError:
        pytest.fail(f"{pattern!r} took 30 seconds on one name")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@pytest.mark.parametrize("key", ["adam_modules", "one_sided_modules"])
def test_patterns_are_checked_as_the_optimizer_reads_them(key: str) -> None:
    r"""Within quotes (a+)+ may be written as \x28a+)+."""
    text = f"eps=1e-8, {key} = '\\x28a+)+'"
    assert getattr(parse_optim_args(text, SoapConfig), key) == "(a+)+" == options.patterns(text)[0]
    assert safety.refusals({"optim_args": text})


def test_the_largest_file_takes_seconds() -> None:
    """A quarter of a megabyte of commas took ten seconds to be refused."""
    begin = time.process_time()
    for text in ("[]," * 30_000, "a: [" + "1," * 32_000, "\n".join(f"k{i}: 1" for i in range(7000)), "- " * 32_000):
        assert read(text[: plain_yaml.MAX_BYTES])[0] is None
    assert time.process_time() - begin < 60


def test_a_card_that_is_no_text_is_refused() -> None:
    """Bytes that are no UTF-8 became replacement characters in names of files."""
    card = f"{recipes._MARK}\n```yaml\nrun_name: ".encode() + b"\xff\xfe\n```\n"
    with pytest.raises(ValueError, match="codec can't decode"):
        recipes.read(recipes.embedded(card), source="it")


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "nul\0byte", "[/red]", "\x1b[2J", ".", "/dev/zero", "~/x"])
def test_any_name_of_a_recipe_is_answered(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no file system takes ended in an OSError."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^got "):
        exchange.load(name)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    """In a folder of somebody else, recipe.yaml may point to a file elsewhere, which pull would write."""
    (tmp_path / "mine.yaml").write_text("seed: 1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "recipe.yaml").symlink_to(tmp_path / "elsewhere")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"a link to .*remove the link"):
            exchange.pull(str(tmp_path / "mine.yaml"), tmp_path / "folder", overwrite=overwrite)
    assert not (tmp_path / "elsewhere").exists()


def test_values_are_shown_as_they_stand(tmp_path: Path) -> None:
    """Brackets are markup to rich: [a-z] vanished from what was shown, and [/x] ended in an error."""
    for name, value in (("a", "[/x] [red]a-z[/red] :smile:"), ("b", "c")):
        (tmp_path / f"[{name}].yaml").write_text(f"run_name: '{value}'")
    done = CliRunner().invoke(
        app, ["recipe", "diff", *(str(tmp_path / f"[{n}].yaml") for n in "ab")], env={"COLUMNS": "400"}
    )
    assert done.exit_code == 1, done.output
    assert "[/x] [red]a-z[/red] :smile:" in done.output
    assert "[a].yaml" in done.output


# ---------------------------------------------------------------------------------------------------------------------
# What lies beside a recipe
# ---------------------------------------------------------------------------------------------------------------------

CANARY = "import os; open(os.environ['CANARY'], 'a').write(__file__ + '\\n')\n"
SONGS = [
    *("run_clm.py", "sitecustomize.py", "usercustomize.py", "__init__.py", "__main__.py", "conftest.py", "setup.py"),
    *("transformers/__init__.py", "torch/__init__.py", "yaml/__init__.py", "rich/__init__.py", "typer.py"),
    *("huggingface_hub/__init__.py", "json.py", "typing.py", "trl", "a.pth", "regex.py"),
]


def sing(folder: Path) -> None:
    """Fills a folder with files that leave a line if any of them is run."""
    for name in SONGS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY)
    (folder / "recipe.yaml").write_text("optim: soap\nlearning_rate: 3e-3\nprovenance: {program: run_clm.py}\n")


INSTALLED = ["-c", "from hf_soap.__main__ import main; main()"]


@pytest.mark.parametrize("start", [["-m", "hf_soap"], pytest.param(INSTALLED, marks=pytest.mark.slow)])
def test_nothing_beside_a_recipe_is_run(start: list[str], tmp_path: Path) -> None:
    """`python -m` puts the working folder in front of all libraries, and a folder with a recipe in it may hold others.

    To find hf_soap, Python itself looks there, and then for what that imports at once; `hf-soap` has no such start.
    """
    program = tmp_path / "program"
    program.mkdir()
    (program / "train.py").write_text("import sys, os, transformers, yaml; print(sys.argv[1:], sys.path[0])")
    here = tmp_path / "downloaded"
    here.mkdir()
    sing(here)
    if start[0] == "-m":
        for early in ("typing.py", "json.py", "torch/__init__.py"):
            (here / early).unlink()
        (here / "torch").rmdir()
    flags = ["-P"] if start[0] == "-c" else []  # or Python itself puts the working folder there
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CANARY": str(tmp_path / "sung")}
    done = subprocess.run(
        [sys.executable, *flags, *start, "run", str(program / "train.py"), "--recipe", "recipe.yaml"],
        cwd=here, capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    sung = tmp_path / "sung"
    assert not sung.exists(), sung.read_text()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['--optim=soap', '--learning_rate=0.003']")


def test_a_recipe_names_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sing(tmp_path)
    assert with_recipe(["mine.py", "--recipe", "."], None, ())[0] == "mine.py"


def test_an_installed_command_is_not_taken_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file `trl` beside the recipe was run by `hf-soap run trl sft`."""
    from hf_soap.cli.run import prepare

    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate").write_text("raise SystemExit('the file')")
    assert "run_path" not in repr(prepare(["accelerate", "env"]))
    assert "run_path" in repr(prepare(["./accelerate", "env"]))

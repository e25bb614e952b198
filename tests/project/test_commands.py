"""Every command in the README, in the other documents and in the heads of the scripts runs as it stands there.

Only sizes are smaller: added to it, where the last one counts, or in the place of its "...". A new command that no
way of running it is known for fails ``test_every_command_has_a_way_to_run``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import typer
from hub import Hub
from paths import PYTHONPATH, ROOT
from tiny import TRANSFORMERS_4

from hf_soap.__main__ import app
from hf_soap.hub import keys

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [path for folder in ("docs", "model_cards") for path in sorted((ROOT / folder).glob("*.md"))]
HEADS = [
    ROOT / "hf_soap" / "cli" / "run.py",
    *(path for path in sorted((ROOT / "scripts").iterdir()) if path.suffix in {".py", ".yaml", ".sh"}),
]
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:python|bash|hf-soap|torchrun|accelerate|pre-commit|source|pytest|pip)\s")


@dataclass(frozen=True)
class Way:
    """How a command is run.

    Attributes:
        more: What is added to it.
        trains: Whether it leaves a checkpoint of SOAP in ``out``.
        slow: Whether it is for the slow tests.
        behind: The start of the command that must have been run before it.
    """

    more: str = ""
    trains: bool = False
    slow: bool = True
    behind: str | None = None


TINY = "--layers 1 --width 16 --heads 2 --vocab-size 256 --seq-len 16 --batch-size 4 --data books"
SHORT = "--learning_rate 3e-3 --max_steps 2 --use_cpu --report_to none --output_dir out"
THEIRS = f"--model_name_or_path gpt2 --train_file notes.txt --block_size 32 --do_train {SHORT}"
CHAT = f"--model_name_or_path gpt2 --dataset_name data --max_length 16 {SHORT}"
OURS = f"--block_size 32 {SHORT}"

LADDER = "--layers 1 --width 16 --steps 12 --seeds 1 --at 6 --data books"

CARD = "--max_steps 2 --eval_strategy epoch --train_files stdlib:argparse.py"
BARE_STEP = "python scripts/bench_step.py --shapes gpt256 --rounds 2 --json step.json"
MEASURE = "OMP_NUM_THREADS=1 python scripts/measure_recipe.py scripts/run_clm.py"
PRETRAINING = "hf-soap run scripts/run_clm.py --recipe model_cards/small-lm-pretraining.yaml"

SMALLER = {
    "hidden_size=256": "hidden_size=16",
    "'books/*.txt'": "notes.txt",
    "--train_tokenizer_vocab 4096": "--train_tokenizer_vocab 300",
    "meta-llama/Meta-Llama-3-8B": "gpt2",
    "--max_steps 60": "--max_steps 2",
    "--steps 300": "--steps 4",
    "--steps 150": "--steps 4",
    "soap=150": "soap=2",
    "60,120,240": "2,4,8",
    "--widen": "--widen --eval-every 4",
    "base/soap/300-steps-lr-0.01-seed-0/checkpoint-300": "gpt2",
}
"""Sizes that cannot be given a second time, and what the command before has left."""

WAYS = {
    "hf-soap compare": Way(TINY),
    "hf-soap run run_clm.py": Way(THEIRS, trains=True),
    "hf-soap run trl": Way(CHAT, trains=True),
    "hf-soap run -m trl.scripts.sft": Way(CHAT, trains=True),
    "hf-soap run scripts/run_clm.py --train_files": Way("--use_cpu --report_to none"),
    "hf-soap run scripts/run_clm.py --recipe outputs/first": Way(
        behind="hf-soap run scripts/run_clm.py --train_files"
    ),
    "hf-soap recipe diff": Way(behind="hf-soap run scripts/run_clm.py --recipe outputs/first"),
    "hf-soap recipe push": Way(behind="hf-soap run scripts/run_clm.py --train_files"),
    "hf-soap run scripts/run_clm.py --recipe user/model": Way(behind="hf-soap recipe push"),
    "hf-soap plan": Way(slow=False),
    "hf-soap recipe validate": Way(slow=False),
    "hf-soap run scripts/run_image_classification.py": Way("--max_steps 2"),
    "hf-soap run scripts/run_mlm.py": Way(CARD),
    "hf-soap run scripts/run_clm.py --recipe model_cards/small-lm-frontier.yaml": Way(CARD),
    "hf-soap run scripts/run_clm.py --recipe model_cards/small-lm-pretraining.yaml": Way(CARD),
    "hf-soap run scripts/run_clm.py --recipe model_cards/small-lm-fine-tuning.yaml": Way(CARD, behind=PRETRAINING),
    "hf-soap run scripts/run_clm.py --recipe model_cards/small-lm-lora.yaml": Way(CARD, behind=PRETRAINING),
    "OMP_NUM_THREADS=1 python scripts/measure_recipe.py": Way(),
    f"{MEASURE} model_cards/small-lm-fine-tuning.yaml": Way(behind=PRETRAINING),
    f"{MEASURE} model_cards/small-lm-lora.yaml": Way(behind=PRETRAINING),
    "python scripts/measure_recipe.py": Way(),
    "python scripts/measure_gpu.py --rehearse": Way(),
    "python scripts/measure_gpu.py --list": Way(),
    "python scripts/count_path.py": Way(),
    "python scripts/ladder.py": Way(LADDER),
    "python scripts/update_readme.py --ladder": Way(behind="python scripts/ladder.py"),
    "python scripts/update_readme.py --steps": Way(behind=BARE_STEP),
    "python scripts/update_readme.py --gpu": Way(behind="python scripts/measure_gpu.py --minutes"),
    "python scripts/measure_gpu.py --minutes": Way("--rehearse --stages kernels"),
    "python scripts/measure_gpu.py --stages": Way("--rehearse --stages kernels"),
    "python scripts/run_image_classification.py": Way(SHORT, trains=True),
    "python scripts/run_mlm.py": Way(OURS, trains=True),
    "torchrun": Way(THEIRS, trains=True),
    "accelerate launch -m": Way(THEIRS, trains=True),
    "accelerate launch --config_file": Way(THEIRS, trains=True),
    "python scripts/run_clm.py --train_files": Way(
        f"{OURS} --config_overrides n_layer=1,n_head=2,n_embd=16", trains=True
    ),
    "python scripts/run_clm.py --model_name_or_path": Way(OURS, trains=True),
    "python scripts/run_clm.py recipe.yaml": Way(),
    BARE_STEP: Way("--only 'MARS lion' --steps 1 --frequency 1"),
    "python scripts/bench_step.py": Way("--shapes gpt256 --rounds 1 --steps 1 --frequency 1 --device cpu"),
    "python scripts/bench_step.py --shapes gpt256 --only SOAP": Way("--only 'MARS lion' --steps 1 --frequency 1"),
    "python scripts/bench_roots.py": Way("--sizes 8 --batches 1 --rounds 1 --device cpu", slow=False),
    "python scripts/bench_tasks.py": Way("--help", slow=False),
    "python scripts/bench_async.py": Way("--steps 6 --frequency 3 --width 8 --layers 1"),
    "python scripts/bench_metrics.py": Way("--steps 4 --log-every 2"),
    "python scripts/bench_distributed.py": Way("--processes 2 --rounds 1"),
    "python scripts/new_mixtral.py": Way(),
    "hf-soap compare adamw soap soap:stacked_matrices=false": Way(
        "--seq-len 16 --batch-size 4 --data books", behind="python scripts/new_mixtral.py"
    ),
    "hf-soap options": Way(slow=False),
    "python scripts/update_readme.py": Way(slow=False),
    "bash scripts/quickstart.sh": Way(f"--steps 2 {TINY}"),
    "bash scripts/test.sh": Way("tests/config/test_schema.py"),
    "bash scripts/test_full.sh": Way("--no-oldest tests/config/test_schema.py"),
    "pre-commit install": Way(),
    "source .venv/bin/activate": Way("&& python --version"),
}
"""The start of a command to how it is run; of several that fit, the longest."""


def lines(path: Path) -> Iterator[str]:
    """What may be a command: code in documents, the text at the head of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```(?:bash|console)\n(.*?)```", text, flags=re.DOTALL))
    elif path.suffix == ".py":
        text = "\n".join(re.findall(r'"""(.*?)"""', text, flags=re.DOTALL))
    else:
        text = "\n".join(re.findall(r"^# (?:Usage: )?([^\[\n]*)", text, flags=re.MULTILINE))
    yield from (line.strip() for line in text.replace("\\\n", " ").splitlines())


def commands() -> dict[str, set[str]]:
    """Each command, without its comment, and the files that have it."""
    found: dict[str, set[str]] = {}
    for path in (*DOCUMENTS, *HEADS):
        for line in lines(path):
            if PROGRAM.match(f"{line} "):
                command = shlex.join(shlex.split(line, comments=True)).replace("'...'", "...")
                found.setdefault(command, set()).add(path.name)
    return found


COMMANDS = commands()


def way(command: str) -> str | None:
    """The key in WAYS that fits best."""
    return max((start for start in WAYS if f"{command} ".startswith(f"{start} ")), key=len, default=None)


def test_every_command_has_a_way_to_run() -> None:
    unknown = {command: files for command, files in COMMANDS.items() if way(command) is None}
    assert not unknown, f"add to WAYS how a test runs these: {unknown}"
    unused = WAYS.keys() - {way(command) for command in COMMANDS}
    assert not unused, f"no document has these any more: {unused}"


def test_commands_are_found_wherever_they_stand() -> None:
    """A reader that finds nothing would pass every other test."""
    assert set().union(*COMMANDS.values()) >= {
        "README.md", "CONTRIBUTING.md", "many_ranks.md", "small-lm-pretraining.md", "run.py", "run_clm.py",
        "bench_step.py", "accelerate_fsdp2.yaml", "trl_sft.yaml", "test_full.sh", "update_readme.py",
    }  # fmt: skip
    assert "hf-soap compare adamw soap --steps 300 --steps soap=150" in COMMANDS
    assert "hf-soap run run_clm.py --optim soap --learning_rate 3e-3 ..." in COMMANDS
    assert any("--config_overrides n_layer=6,n_head=6,n_embd=384 --optim soap" in command for command in COMMANDS)


def parse(command: str) -> None:
    """Fails on a program, subcommand or option that does not exist; what only other packages know is not looked at."""
    words = [word for word in shlex.split(command) if word != "..." and not re.match(r"[A-Z_]+=", word)]
    while "hf_soap" in words:  # torchrun ... -m hf_soap run
        words = ["hf-soap", *words[words.index("hf_soap") + 1 :]]
    if words[0] in ("python", "bash") and words[1].startswith("scripts/"):
        known_options(words[1:])
    elif words[0] == "hf-soap":
        group = typer.main.get_command(app)
        names = []
        while hasattr(group, "commands"):
            names.append(words[len(names) + 1])
            assert names[-1] in group.commands, f"hf-soap has no command {names}"
            group = group.commands[names[-1]]
        group.make_context(names[-1], words[len(names) + 1 :])
        if names == ["run"]:
            known_options(words[2:])


def known_options(words: list[str]) -> None:
    """Fails on an option that neither the Trainer nor the training scripts nor the script's own source know."""
    script = ROOT / words[0]
    assert script.is_file() or not words[0].startswith("scripts/"), f"{words[0]} does not exist"
    source = script.read_text() if script.is_file() else ""
    known = {"recipe", "config"} | keys.key_types().keys()
    known |= {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', source)}  # argparse
    known |= {name.replace("-", "_") for name in re.findall(r"--(no-\w+)", source)}  # typer's switches
    known |= {*re.findall(r"^    (\w+): Annotated\[", source, re.MULTILINE)}  # typer's other options
    for option in (word[2:].replace("-", "_") for word in words if word.startswith("--")):
        assert option in known, f"{words[0]} has no --{option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("hf-soap plant gpt2", "no command"),
        ("hf-soap plan gpt2 --no-such-option 1", "No such option"),
        ("hf-soap compare adamw soap --steps", "requires an argument"),
        ("torchrun -m hf_soap run run_clm.py --optin soap", "has no --optin"),
        ("python scripts/run_clm.py --no_such_option 1", "has no --no_such_option"),
        ("python scripts/bench_step.py --shape gpt256", "has no --shape"),
        ("python scripts/bench_roots.py --size 64", "has no --size"),
        ("python scripts/no_such_script.py", "does not exist"),
    ],
)
def test_what_does_not_parse_is_noticed(command: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parse(command)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with this Python and its commands, under the names that a user types.

    ``python`` also stands in for pip: an installation of this package is there already.
    """
    folder = tmp_path_factory.mktemp("bin")
    modules = {
        "hf-soap": "hf_soap",
        "torchrun": "torch.distributed.run",
        "accelerate": "accelerate.commands.accelerate_cli",
        "pre-commit": "pre_commit",
    }
    for name, module in modules.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
    (folder / "python").write_text(
        f"""#!/bin/sh
        case "$*" in
            "-m venv --clear "*) mkdir -p "$4/bin"; cp "{folder}"/* "$4/bin"; touch "$4/bin/activate" ;;
            "-m pip install "*) ;;
            *) exec "{sys.executable}" "$@" ;;
        esac
        """
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Path:
    """A checkout with the files that the commands name."""
    for name in ("docs", "scripts", "tests", "hf_soap", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    for recipe in (tmp_path / "model_cards").glob("*.yaml"):
        text = re.sub(r"^(max_steps|warmup_steps|eval_steps): \d+", r"\1: 2", recipe.read_text(), flags=re.MULTILINE)
        recipe.write_text(text.replace("stdlib:*.py", "stdlib:argparse.py"))
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    shutil.copytree(tiny_model, tmp_path / "gpt2")
    shutil.copytree(tiny_model / "data", tmp_path / "data")
    shutil.copy(tiny_model / "text.txt", tmp_path / "notes.txt")
    (tmp_path / "books").mkdir()
    shutil.copy(tiny_model / "text.txt", tmp_path / "books" / "one.txt")
    recipe = {"model_name_or_path": "gpt2", "train_files": ["notes.txt"], "block_size": 32, "optim": "soap"}
    recipe |= {"max_steps": 2, "use_cpu": True, "report_to": "none", "output_dir": "out", "learning_rate": 3e-3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path


def on_this_machine(command: str, more: str) -> str:
    """The command with sizes, and with two processes that shard on CPUs where it is for a machine of GPUs."""
    command = command.replace("...", more) if "..." in command else f"{command} {more}"
    for size, smaller in SMALLER.items():
        command = command.replace(size, smaller)
    if "measure_recipe.py" in command:  # one rate each, and recipes that :func:`place` has shortened
        command = re.sub(r"(--lr \w+=[^, ]+),\S+", r"\1", command)
    if command.startswith("source"):
        return command
    if "--fsdp" in command or "accelerate_fsdp2" in command:
        command = command.replace("-m hf_soap", "tests/helpers/fsdp_on_cpus.py").replace("per_node 8", "per_node 2")
        command = command.replace("fsdp2.yaml", "fsdp2.yaml --num_processes 2")
    elif command.startswith("accelerate launch"):
        command = command.replace("launch", "launch --cpu --num_processes 1")
    return command


def run(command: str, place: Path, programs: Path, environment: Mapping[str, str] = MappingProxyType({})) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env={
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(programs / "python"),
            "PYTHONPATH": PYTHONPATH,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def state_keys(folder: Path) -> set[str]:
    """The names under which the optimizer of the last checkpoint keeps its state, in one file or one per rank."""
    checkpoint = max(folder.glob("checkpoint-*"))
    if (checkpoint / "optimizer.pt").exists():
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        return set().union(*saved["state"].values())
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata
    return {name.rpartition(".")[2] for name in names}


CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()

CASES = [
    pytest.param(command, id=command[:100], marks=pytest.mark.slow if WAYS[key].slow else ())
    for command in COMMANDS
    if (key := way(command)) is not None
]


@pytest.mark.parametrize("command", CASES)
def test_command_runs(command: str, place: Path, programs: Path, hub: Hub, request: pytest.FixtureRequest) -> None:
    key = way(command)
    assert key is not None
    if command.startswith("bash scripts/test") and f"mypy=={version('mypy')}" not in CONSTRAINTS:
        pytest.skip("code is checked with the versions of constraints.txt")
    if "--fsdp --" in command and TRANSFORMERS_4:
        pytest.skip("transformers 4 wants a value for --fsdp")
    environment = hub.environment(place / "home") if "user/model" in command else {}
    first = []
    while (before := WAYS[way(first[0] if first else command) or ""].behind) is not None:
        first.insert(0, next(other for other in COMMANDS if way(other) == before))
    for other in first:
        run(on_this_machine(other, WAYS[way(other) or ""].more), place, programs, environment)
    if " run_clm.py" in command:
        shutil.copy(request.getfixturevalue("run_clm"), place)
    if command == "pre-commit install":
        subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    if command.startswith("source"):
        run("bash -c '. scripts/_venv.sh; ensure_venv .venv .[dev] constraints.txt'", place, programs)
    output = run(on_this_machine(command, WAYS[key].more), place, programs, environment)
    if WAYS[key].trains:
        assert state_keys(place / "out") & {"basis_0", "basis_1"}, output

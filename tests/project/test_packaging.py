"""The shape of the package: who imports whom, what an import costs, what is declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from paths import PYTHONPATH, ROOT

PACKAGE = ROOT / "hf_soap"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FOLDERS = (
    "reference",
    "linalg",
    "distributed",
    "config",
    "rules",
    "checkpoint",
    "engine",
    "optimizers",
    "planning",
    "hub",
    "trainer",
    "__init__",
    "cli",
    "__main__",
)
"""A folder imports only from those before it, and from its own modules without a circle; for types, too."""

ALONE = "reference"
"""What others are compared with shares nothing with them: it imports none of them, and none imports it."""

EXTRAS = {
    "cli": {"cli", "peft", "plot"},
    "__main__": {"cli"},
    "trainer": {"trainer"},
    "hub": {"trainer", "plot"},
}
"""The extras that a folder may import from; those that are not listed make do with what is always installed."""

PEERS = {"heavyball", "ista-daslab-optimizers", "pytorch-optimizer", "soap"}
"""Optimizer packages that a benchmark times where it finds them."""

USERS = {
    "transformers": {"cli", "trainer", "hub", "optimizers.grouping"},
    "accelerate": {"cli", "trainer", "hub", "optimizers.grouping"},
    "peft": {"cli", "trainer", "hub", "optimizers.grouping"},
    "torch.distributed": {"distributed", "checkpoint"},
    "datasets": {"cli"},
    "matplotlib": {"cli", "hub.cards"},
    "jinja2": {"cli", "hub.cards"},
    "typer": {"cli", "__main__"},
    "rich": {"cli", "__main__", "optimizers.grouping"},
}
"""The folders and modules that may import a library; libraries that are not listed are open to all."""


def layer(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(source: Path) -> str:
    """Dotted name of a file below the package; a folder's own for its `__init__`, and `__init__` for the package's."""
    return ".".join(source.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def within(source: Path, places: set[str]) -> bool:
    """Whether a file is one of these modules, or lies in one of these folders."""
    module = module_of(source)
    return any(module == place or module.startswith(f"{place}.") for place in places)


def ours(source: Path) -> Iterator[str]:
    """Modules below the package that a file imports; `from hf_soap import SOAP` asks the package itself."""
    for imported in imports(source, for_types=True):
        if imported.split(".")[0] == "hf_soap":
            name = imported.partition(".")[2]
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            yield name or "__init__"


def imports(source: Path, *, for_types: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, in functions too; those that only type checkers read where asked for."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if not for_types and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import; name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def name(source: Path) -> str:
    return str(source.relative_to(PACKAGE))


MODULES = {module_of(source): source for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_folder_imports_from_those_before_it(source: Path) -> None:
    own = layer(source)
    assert own in FOLDERS, f"{own} has no place in FOLDERS; add it after all that it imports"
    for imported in ours(source):
        other = imported.split(".")[0]
        assert FOLDERS.index(other) <= FOLDERS.index(own), f"{name(source)} imports {imported}, which comes after it"
        assert (own == ALONE) == (other == ALONE), f"{name(source)} imports {imported}, but {ALONE} stands alone"


def test_imports_within_a_folder_go_in_no_circle() -> None:
    sorter = TopologicalSorter({module: set(ours(source)) - {module} for module, source in MODULES.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' > '.join(error.args[1])}")


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if not folder.startswith("__")])
def test_a_folder_says_what_lives_in_it(folder: str) -> None:
    body = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(body), f"hf_soap/{folder}/__init__.py has no docstring"
    defined = [node for node in body.body[1:] if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node).split(" = ")[0] for node in defined] in ([], ["__all__"]), "an __init__ defines nothing"


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_libraries_are_imported_where_they_belong(source: Path) -> None:
    for imported in imports(source):
        for library, users in USERS.items():
            if imported == library or imported.startswith(f"{library}."):
                assert within(source, users), f"{name(source)} imports {imported}, which only {sorted(users)} may"


def test_import_is_lazy() -> None:
    """Once an import of a plotting or data library creeps in, every run of every script pays for it."""
    heavy = ["accelerate", "datasets", "matplotlib", "peft", "trl", "typer"]
    code = f"import hf_soap, sys; print(*(m for m in {heavy} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def distribution(requirement: str) -> str:
    """The normalized name in a requirement or a distribution's own name."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def of_extra(name: str) -> set[str]:
    """Distributions of an extra, those of the extras that it names included."""
    found = set()
    for requirement in PROJECT["project"]["optional-dependencies"][name]:
        if (nested := re.fullmatch(r"hf-soap\[(.*)\]", requirement)) is not None:
            found |= set().union(*map(of_extra, nested[1].split(",")))
        else:
            found.add(distribution(requirement))
    return found


def declared() -> tuple[set[str], set[str]]:
    """Distributions that are always installed, and those of the extras."""
    extras = set().union(*map(of_extra, PROJECT["project"]["optional-dependencies"]))
    return {distribution(req) for req in PROJECT["project"]["dependencies"]}, extras


def test_what_is_imported_is_declared() -> None:
    required, extras = declared()
    providers = packages_distributions()
    files = [(source, required.union(*map(of_extra, EXTRAS.get(layer(source), ())))) for source in SOURCES]
    files += [(source, required | extras | PEERS) for source in (ROOT / "scripts").glob("*.py")]
    for source, allowed in files:
        for top in {imported.split(".")[0] for imported in imports(source)}:
            if top in sys.stdlib_module_names or top == "hf_soap" or source.with_name(f"{top}.py").exists():
                continue
            owners = {distribution(owner) for owner in [top, *providers.get(top, [])]}
            assert owners & allowed, f"{source.name} imports {top}, which pyproject.toml does not declare"


def test_everything_is_all_and_all_is_for_development() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert of_extra("all") == set().union(*(of_extra(name) for name in extras if name != "dev"))
    assert of_extra("all") < of_extra("dev")
    assert of_extra("cli") | of_extra("peft") < of_extra("scripts")


# What is not always installed

NOT_INSTALLED = """
import sys
from importlib.machinery import PathFinder

missing = sys.argv.pop(1).split(",")

class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in missing else super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Python as it is where some packages are not installed: they are neither imported nor found."""


def without(missing: set[str], code: str, *arguments: str, status: int = 0) -> str:
    """What a program prints where these packages are missing; they must not have been loaded at its end."""
    check = f"\nassert not {sorted(missing)!r} & sys.modules.keys()".replace("[", "{").replace("]", "}")
    command = [sys.executable, "-c", NOT_INSTALLED + code + (check if status == 0 else "")]
    command += [",".join(sorted(missing)), *arguments]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


OPTIONAL = {
    "datasets",
    "evaluate",
    "jinja2",
    "matplotlib",
    "pandas",
    "peft",
    "psutil",
    "pyarrow",
    "rich",
    "trl",
    "typer",
}

STEPS = """
import torch
import hf_soap
from hf_soap.trainer.registry import ENTRIES

for entry in ENTRIES.values():
    param = torch.nn.Parameter(torch.randn(4, 6))
    before = param.detach().clone()
    optimizer = entry.optimizer([param], lr=0.1, **entry.config().constructor_kwargs())
    for _ in range(3):
        param.grad = torch.randn(4, 6)
        optimizer.step()
    assert param.isfinite().all() and not torch.equal(param, before), entry.config.name
assert isinstance(hf_soap.SOAP([torch.nn.Parameter(torch.ones(2, 2))]), torch.optim.Optimizer)
assert "transformers" not in sys.modules
"""

TRAINS = """
import tempfile
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

class Counting(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": torch.arange(8), "labels": torch.arange(8)}

sizes = dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(GPT2Config(**sizes))
with tempfile.TemporaryDirectory() as folder:
    settings = dict(learning_rate=3e-3, max_steps=3, save_steps=3, report_to="none", use_cpu=True)
    args = TrainingArguments(folder, optim="soap", optim_args={"precondition_frequency": 2}, **settings)
    trainer = Trainer(model, args, train_dataset=Counting())
    trainer.train()
    assert type(trainer.optimizer.optimizer) is hf_soap.SOAP
    args.max_steps = 4
    Trainer(model, args, train_dataset=Counting()).train(resume_from_checkpoint=True)
from hf_soap import SoapMetricsCallback
"""


def test_the_optimizers_and_their_names_need_no_extra() -> None:
    """Who wanted `SOAP` for a loop of their own had to install data sets, adapters and a command line."""
    assert not {"datasets", "jinja2", "peft", "psutil", "rich", "typer"} & declared()[0]
    without(OPTIONAL, STEPS + TRAINS)


@pytest.mark.parametrize(
    ("missing", "arguments", "remedy"),
    [
        ("typer", ["plan", "x"], "hf-soap plan needs typer: pip install 'hf-soap[cli]'"),
        ("rich", ["--help"], "hf-soap needs rich: pip install 'hf-soap[cli]'"),
        ("jinja2", ["compare"], "hf-soap compare needs jinja2: pip install 'hf-soap[cli]'"),
    ],
)
def test_a_command_says_which_extra_it_needs(missing: str, arguments: list[str], remedy: str) -> None:
    said = without({missing}, "from hf_soap.__main__ import main; main()", *arguments, status=1)
    assert said.splitlines()[-1] == remedy
    assert "Traceback" not in said


def test_adapters_say_which_extra_they_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    program = "from hf_soap.__main__ import main; main()"
    said = without({"peft"}, program, "plan", str(tmp_path), "--lora-r", "8", status=2)
    assert "--lora-r needs peft: pip install 'hf-soap[peft]'" in " ".join(said.replace("│", " ").split())


def test_the_trainer_says_which_extra_it_needs() -> None:
    said = without({"jinja2"}, "from hf_soap import SoapTrainer", status=1)
    assert said.splitlines()[-1].endswith("SoapTrainer needs jinja2: pip install 'hf-soap[trainer]'")


def test_memory_is_not_looked_at_without_psutil() -> None:
    code = """
import torch
from hf_soap.trainer import preflight
assert preflight.device_memory(torch.device("cpu")) is None
"""
    without({"psutil"}, code)


# What an index shows, and what a wheel holds


def test_links_of_the_readme_work_where_an_index_shows_it() -> None:
    """On an index's page the pictures were missing and links to other documents led nowhere."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert hook["fragments"] == [{"path": "README.md"}]
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    text = source
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    home = PROJECT["project"]["urls"]["Homepage"]
    raw = home.replace("github.com", "raw.githubusercontent.com") + "/main/"
    before, after = (re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", each) for each in (source, text))
    assert len(before) == len(after) > 15
    rewritten = 0
    for (picture, target), (_, shown) in zip(before, after, strict=True):
        if target.startswith(("https:", "#")):
            assert shown == target
        else:
            assert (ROOT / target.partition("#")[0]).is_file()
            assert shown == (raw if picture else f"{home}/blob/main/") + target
            rewritten += 1
    assert rewritten > 10
    assert len(text) - len(source) > 10 * len(raw)


def test_addresses_are_those_of_one_repository() -> None:
    urls = PROJECT["project"]["urls"]
    assert urls.keys() == {"Homepage", "Repository", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith("https://github.com/hf-soap/hf_soap") for url in urls.values())
    assert (ROOT / "CHANGELOG.md").is_file()


@pytest.mark.slow
def test_a_wheel_holds_what_is_promised(tmp_path: Path) -> None:
    """`Typing :: Typed` stood among the classifiers, and type checkers saw no types for want of py.typed."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=600)
    if "hatch" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("no index has hatchling and its plugin here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    inside = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in inside if "__pycache__" not in name} == {n for n in names if n.startswith("hf_soap/")}
    assert "hf_soap/py.typed" in names
    assert "Classifier: Typing :: Typed" in metadata
    assert "hf_soap/hf_soap/main/model_cards/soap-at-half-the-steps.png)" in metadata
    assert not re.findall(r"\]\((?!https:|#)", metadata)


def test_types_are_for_others_too() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_the_command_has_a_version() -> None:
    from typer.testing import CliRunner

    from hf_soap.__main__ import app

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"hf-soap {PROJECT['project']['version']}\n")
    assert CliRunner().invoke(app, []).exit_code == CliRunner().invoke(app, ["run"]).exit_code == 2


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_pin_what_is_declared(constraints: str) -> None:
    lines = (ROOT / constraints).read_text(encoding="utf-8").split("\n")
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        # A local version such as 2.13.0+cpu, or a path, exists on one machine only.
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin), f"wanted NAME==VERSION, got {pin!r}"
    required, extras = declared()
    missing = (required | extras) - {distribution(pin) for pin in pins}
    assert not missing, f"{constraints} does not pin {sorted(missing)}"

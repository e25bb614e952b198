"""The shape of the package: who imports whom, what an import costs, what is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_soap"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    "__main__",
    "cli",
    "__init__",
    "trainer",
    "cards",
    "recipes",
    "preflight",
    "planning",
    "extension",
    "registry",
    "callbacks",
    "metrics",
    "resume",
    "checksums",
    "hooks",
    "grouping",
    "costs",
    "optimizers",
    "stepping",
    "state",
    "checks",
    "checkpoint",
    "configs",
    "schema",
    "refreshes",
    "guard",
    "chunks",
    "buckets",
    "members",
    "recut",
    "owners",
    "rules",
    "background",
    "failures",
    "verdict",
    "blocks",
    "probe",
    "updates",
    "storage",
    "bases",
    "roots",
    "linalg",
    "precision",
    "sharding",
]
"""A module imports only from those listed after it, and within a folder from its siblings."""

PEERS = {"heavyball", "pytorch-optimizer"}
"""Optimizer packages that a benchmark times where it finds them."""

USERS = {
    "transformers": {"cli", "trainer", "cards", "recipes", "callbacks", "extension", "registry", "grouping"},
    "accelerate": {"cli", "trainer", "cards", "recipes", "callbacks", "extension", "registry", "grouping"},
    "peft": {"cli", "trainer", "cards", "recipes", "callbacks", "extension", "registry", "grouping"},
    "torch.distributed": {"sharding", "owners", "checkpoint"},
    "datasets": {"cli"},
    "matplotlib": {"cli", "cards"},
    "jinja2": {"cli", "cards"},
    "typer": {"cli", "__main__"},
    "rich": {"cli", "__main__", "grouping"},
}
"""The modules that may import a library; libraries that are not listed are open to all."""


def layer(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: Path) -> Iterator[str]:
    """Dotted names that a file imports, in functions too, but not those that only type checkers read."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
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


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_imports_point_downwards(source: Path) -> None:
    own = layer(source)
    assert own in LAYERS, f"{own} has no place in LAYERS; add it above all that it imports"
    for imported in imports(source):
        if imported.split(".")[0] != "hf_soap":
            continue
        part = imported.split(".")[1] if "." in imported else "__init__"
        # `from hf_soap import SOAP` names no module: it is the package that is asked.
        other = part if part in LAYERS else "__init__"
        siblings = own == other and (PACKAGE / own).is_dir()
        assert siblings or LAYERS.index(other) > LAYERS.index(own), f"{own} imports {imported} from above"


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_libraries_are_imported_where_they_belong(source: Path) -> None:
    for imported in imports(source):
        for library, users in USERS.items():
            if imported == library or imported.startswith(f"{library}."):
                assert layer(source) in users, f"{name(source)} imports {imported}, which only {sorted(users)} may"


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


def declared() -> tuple[set[str], set[str]]:
    """Distributions that are always installed, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {distribution(req) for group in project["optional-dependencies"].values() for req in group}
    return {distribution(req) for req in project["dependencies"]}, extras - {"hf-soap"}


def test_what_is_imported_is_declared() -> None:
    required, extras = declared()
    providers = packages_distributions()
    files = [(source, required | {"matplotlib"}) for source in SOURCES]
    files += [(source, required | extras | PEERS) for source in (ROOT / "scripts").glob("*.py")]
    for source, allowed in files:
        for top in {imported.split(".")[0] for imported in imports(source)}:
            if top in sys.stdlib_module_names or top == "hf_soap" or source.with_name(f"{top}.py").exists():
                continue
            owners = {distribution(owner) for owner in [top, *providers.get(top, [])]}
            assert owners & allowed, f"{source.name} imports {top}, which pyproject.toml does not declare"


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

"""A version of transformers in which something that is replaced is missing, or is called in another way.

Each target of the table is removed, and each gets other parameters, before this package extends transformers. What
needs the target is then left out with one warning, and a Trainer trains as before.
"""

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_soap import SOAP
from hf_soap.engine.optimizer import unwrapped
from hf_soap.trainer import patches
from hf_soap.trainer.patches import PATCHES, Names, Patch, Target

NAMES = PATCHES[0]


def exists(patch: Patch) -> bool:
    return patch.option is None or patch.option in TrainingArguments.__dataclass_fields__


TARGETS = [
    pytest.param(patch, target, id=target.path) for patch in PATCHES if exists(patch) for target in patch.targets
]


@pytest.fixture
def untouched(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Transformers as it is without this package, which extends it again afterwards. Gives the log."""
    clear()
    caplog.clear()
    yield caplog
    clear()
    patches.install()


def clear() -> None:
    for undone in patches._undo.values():
        for undo in reversed(undone):
            undo()
    patches._undo.clear()
    patches._skipped.clear()
    patches._reported.clear()


def remove(target: Target) -> Callable[[], None]:
    owner, name = target.owner(), target.name
    # What is inherited is hidden, not removed: other enumerations have it too.
    raw, own = inspect.getattr_static(owner, name), name in vars(owner)
    if own:
        delattr(owner, name)
    else:
        setattr(owner, name, None)
    return lambda: setattr(owner, name, raw) if own else delattr(owner, name)


def call_otherwise(target: Target) -> Callable[[], None]:
    """Gives a function other names of parameters, and an enumeration another make."""
    owner, name = target.owner(), target.name
    raw, own, original = inspect.getattr_static(owner, name), name in vars(owner), getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    parameters = inspect.signature(original).parameters.values()
    renamed = [parameter.replace(name=f"new_{parameter.name}") for parameter in parameters]
    changed.__signature__ = inspect.Signature(renamed)  # type: ignore[attr-defined]
    new: Any = type(raw)(changed) if isinstance(raw, (staticmethod, classmethod)) else changed
    setattr(owner, name, type("Names", (), {}) if isinstance(target, Names) else new)
    return lambda: setattr(owner, name, raw) if own else delattr(owner, name)


def extend() -> None:
    patches.install()
    patches.extend_cards(Trainer)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.name == patches.logger.name and r.levelno >= logging.WARNING]


def assert_trains(folder: Path, *, by_name: bool, saves: bool = False) -> None:
    """Two steps by SOAP, and perhaps a checkpoint after the second."""
    settings: dict[str, Any] = {
        "max_steps": 2,
        "save_strategy": "steps" if saves else "no",
        "save_steps": 2,
        "learning_rate": 0.01,
    }
    model = tiny.gpt2(n_layer=1)
    before = model.transformer.wte.weight.detach().clone()
    given: dict[str, Any] = {} if by_name else {"optimizer_cls_and_kwargs": (SOAP, {"lr": 0.01})}
    args = tiny.arguments(folder, optim="soap" if by_name else "adamw_torch", **settings)
    trainer = Trainer(model, args, train_dataset=tiny.Counting(8), **given)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert isinstance(optimizer, SOAP)
    assert optimizer.state[model.transformer.wte.weight]["step"] == 2
    assert not torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize("change", [pytest.param(remove, marks=pytest.mark.slow), call_otherwise])
@pytest.mark.parametrize(("patch", "target"), TARGETS)
def test_what_does_not_fit_is_skipped_and_a_run_trains(
    untouched: pytest.LogCaptureFixture,
    change: Callable[[Target], Callable[[], None]],
    patch: Patch,
    target: Target,
    tmp_path: Path,
) -> None:
    unextended = {each.path: inspect.getattr_static(each.owner(), each.name) for each in patch.targets}
    repair = change(target)
    try:
        extend()
    finally:
        repair()  # the Trainer itself has it, by whatever name it goes there
    (warning,) = warnings(untouched)
    assert target.path in warning
    for each in PATCHES:
        paths = [one.path for one in each.targets]
        lacks = target.path in paths or any(path.startswith(f"{target.path}.") for path in paths)
        assert (f"{each.what}, because " in warning) == (each.without in warning) == lacks
    for one in patch.targets:
        assert inspect.getattr_static(one.owner(), one.name) is unextended[one.path]
    assert_trains(tmp_path, by_name=patch is not NAMES, saves="checksums" in patch.what)
    if patch is NAMES:
        with pytest.raises(ValueError, match="soap is not a valid OptimizerNames"):
            tiny.arguments(tmp_path)
    extend()
    assert len(warnings(untouched)) == 1


def test_one_warning_names_all_that_is_skipped(untouched: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    concerned = [patch for patch in PATCHES if exists(patch) and not patch.by_command]
    repairs = [remove(patch.targets[-1]) for patch in concerned]
    try:
        patches.install()
    finally:
        for repair in reversed(repairs):
            repair()
    (warning,) = warnings(untouched)
    for patch in concerned:
        assert patch.what in warning
    assert_trains(tmp_path, by_name=False)


def test_all_fits_this_version(untouched: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    extend()
    assert not warnings(untouched)
    assert not patches._skipped
    assert_trains(tmp_path, by_name=True, saves=True)


def test_more_parameters_are_passed_on(untouched: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A checkpoint was given metrics once, and a replacement with fixed parameters ended every run that saved one."""
    saves, seen = Trainer._save_checkpoint, []

    def save_with_metrics(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        seen.append(metrics)
        saves(self, model, trial)

    class Saving(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._save_checkpoint(trainer.model, None, metrics={"loss": 1.0})

    Trainer._save_checkpoint = save_with_metrics  # type: ignore[method-assign]
    try:
        extend()
        args = tiny.arguments(tmp_path, max_steps=1)
        trainer: Any = Trainer(tiny.gpt2(n_layer=1), args, train_dataset=tiny.Counting(8), callbacks=[Saving()])
        trainer.train()
    finally:
        clear()
        Trainer._save_checkpoint = saves  # type: ignore[method-assign]
    assert seen == [{"loss": 1.0}]
    assert not warnings(untouched)
    assert (tmp_path / "checkpoint-1" / "checksums_0.json").is_file()


def test_an_error_while_replacing_leaves_that_out_alone(
    untouched: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(self: Names, owner: Any) -> Callable[[], None]:
        raise RuntimeError("enumerations are final now")

    monkeypatch.setattr(Names, "replace_in", failing)
    extend()
    (warning,) = warnings(untouched)
    assert "names of optimizers, because RuntimeError: enumerations are final now" in warning
    assert_trains(tmp_path, by_name=False)


def test_a_wrapper_of_somebody_else_fits(untouched: pytest.LogCaptureFixture) -> None:
    loads = Trainer._load_from_checkpoint

    def anything(self: Any, *args: Any, **kwargs: Any) -> None:
        loads(self, *args, **kwargs)

    Trainer._load_from_checkpoint = anything  # type: ignore[method-assign]
    try:
        extend()
        assert not warnings(untouched)
        assert Trainer._load_from_checkpoint is not anything
    finally:
        clear()
        Trainer._load_from_checkpoint = loads  # type: ignore[method-assign]


def test_nothing_is_asked_of_a_version_without_the_option(
    untouched: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4 has no checkpoints on SIGTERM."""
    fields = dict(TrainingArguments.__dataclass_fields__)
    fields.pop("enable_jit_checkpoint", None)
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", fields)
    monkeypatch.setitem(sys.modules, "transformers.trainer_jit_checkpoint", None)
    extend()
    assert not warnings(untouched)


def test_the_table_has_every_replacement() -> None:
    table = patches.patches_table()
    for patch in PATCHES:
        assert patch.what in table
        for target in patch.targets:
            assert (f"`{target.module}.{target.path}`" in table) == (target.make is not None or type(target) is Names)


def test_nothing_else_of_transformers_is_replaced(untouched: pytest.LogCaptureFixture) -> None:
    """The table was to be all of it: what a module of the Trainer holds before and after is compared."""
    modules = [import_module(name) for name in {t.module for p in PATCHES if exists(p) for t in p.targets}]

    def contents() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for module in modules:
            for name, value in vars(module).items():
                found[f"{module.__name__}.{name}"] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    own = {key: own for key, own in vars(value).items() if not key.startswith("_member")}
                    found |= {f"{module.__name__}.{name}.{key}": each for key, each in own.items()}
        return found

    before = contents()
    extend()
    after = contents()
    changed = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    names = {
        name for name in changed if name.startswith(f"{patches.ARGUMENTS}.OptimizerNames.") and name[-1].isupper()
    }
    replaced = {f"{t.module}.{t.path}" for p in PATCHES if exists(p) for t in p.targets if t.make is not None}
    assert changed - names == replaced


BROKEN_BEFORE_IMPORT = """
import sys
import hf_soap

def spoil_first(callback):
    def spoil(module):
        if module.__name__ == "transformers.training_args":
            del module.TrainingArguments.set_optimizer
        else:
            del module.Trainer._save_rng_state
        callback(module)
    return spoil

for finder in sys.meta_path:
    if type(finder).__module__ == "hf_soap.trainer.import_hook":
        finder.callback = spoil_first(finder.callback)

from transformers import TrainingArguments  # alone: the Trainer is not asked for
print(TrainingArguments("x", optim="soap", use_cpu=True, report_to="none").optim.value)
"""


def test_an_import_of_the_arguments_alone_gets_one_warning_of_all() -> None:
    command = [sys.executable, "-c", BROKEN_BEFORE_IMPORT]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["soap"]
    assert done.stderr.count("differs from the versions that this hf_soap supports") == 1
    assert "TrainingArguments.set_optimizer" in done.stderr
    assert "Trainer._save_rng_state" in done.stderr

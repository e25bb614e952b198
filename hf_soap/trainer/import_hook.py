"""Runs code right after another module has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls ``callback`` with a module, immediately if it is loaded, otherwise right after its first import.

    Thus ``import hf_soap`` need not load the Trainer, which takes seconds and which an optimizer alone does not need.

    Args:
        name: Full name of the module.
        callback: Called with the loaded module.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        callback(module)
    else:
        sys.meta_path.insert(0, _Finder(name, callback))


class _Finder(MetaPathFinder):
    """Finds one module and wraps its loader; leaves all other modules to the other finders."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name, self.callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # finding the spec alone does not import anything yet
                sys.meta_path.remove(self)
                self.callback(module)

        setattr(spec.loader, "exec_module", execute_and_call)  # noqa: B010 - mypy refuses the assignment
        return spec

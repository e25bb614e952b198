"""Runs at the start of each Python process below ``hf-soap run``: importing transformers registers the optimizers.

Most of those processes never train, so this file imports nothing slow, such as torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib costs more than all else here
_PACKAGE = os.path.dirname(os.path.dirname(_HERE))  # noqa: PTH120


def _run(name: str, path: str) -> ModuleType:
    module = ModuleType(name)
    SourceFileLoader(name, path).exec_module(module)
    return module


def _register(_: ModuleType) -> None:
    try:
        importlib.import_module("hf_soap")
    except ModuleNotFoundError as error:
        if error.name != "hf_soap":
            raise
        # The launcher ran from a source tree that is not on the path of this process.
        sys.path.append(os.path.dirname(_PACKAGE))  # noqa: PTH120
        importlib.import_module("hf_soap")
    importlib.import_module("hf_soap.cli.launched").start(sys.argv)


def _run_next_sitecustomize() -> None:
    # Python runs only the first sitecustomize on the path, and the environment may have its own.
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.origin is not None:
        _run("sitecustomize", spec.origin)


# Loaded by path: importing it from the package would import the package and with it torch.
_hooks = _run("_hf_soap_hooks", os.path.join(_PACKAGE, "trainer", "import_hook.py"))  # noqa: PTH118
_hooks.after_import("transformers", _register)
_run_next_sitecustomize()

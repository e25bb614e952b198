"""Settings that must hold before anything is imported, and what decides which tests run."""

import logging
import os
import tempfile

# Read at import time by the libraries, hence up here. Nothing may reach the network or the user's caches.
_caches = tempfile.TemporaryDirectory(prefix="hf_soap-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _caches.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny matrices are fastest on one thread, and sums come out the same on every machine. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def usual_log_levels() -> None:
    """The package's logger follows the Trainer's level, and a command that wants silence sets that for the process."""
    logging.getLogger("hf_soap").setLevel(logging.NOTSET)
    logging.getLogger("transformers").setLevel(logging.WARNING)


def pytest_unconfigure() -> None:
    _caches.cleanup()

"""Settings that must hold before anything is imported, and what decides which tests run."""

import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read at import time by the libraries, hence up here. Nothing may reach the network or the user's caches.
_caches = tempfile.TemporaryDirectory(prefix="hf_soap-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _caches.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny matrices are fastest on one thread, and sums come out the same on every machine. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from generated import CASES
from hub import Hub, serve

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# The fast tests generate the same cases everywhere; the slow ones draw new ones each time, and say how to repeat one.
_every = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fast", **_every, derandomize=True, max_examples=60, stateful_step_count=12)
hypothesis.settings.register_profile("full", **_every, max_examples=2500, stateful_step_count=20, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("full" if config.getoption("--slow") else "fast")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["cases"] = dict(CASES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    CASES.update(getattr(node, "workeroutput", {}).get("cases", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if CASES:
        terminalreporter.section("generated cases")
        for name, number in sorted(CASES.items()):
            terminalreporter.line(f"{number:7d} {name}")
        terminalreporter.line(f"{sum(CASES.values()):7d} together")


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


@pytest.fixture(autouse=True)
def no_settings_of_other_tests() -> Iterator[None]:
    """transformers 4 writes ``bf16=True`` and the like into the environment, where later tests would find it."""
    before = dict(os.environ)
    yield
    for name in {name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub on this machine."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, a text file and a dataset of JSON lines, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = [f"{i} times {j} is {i * j}" for i in range(30) for j in range(30)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))

    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_soap.cli.compare.corpus import build_corpus

    tokenizer = build_corpus(folder / "text.txt", vocab_size=256, seq_len=8, max_held_out=1).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<eos>"})
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=257, n_positions=64, n_layer=1, n_embd=16, n_head=2, bos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


RUN_CLM_COMMIT = "00d481d18f914b55e65faa31e82321629691eadb"


@pytest.fixture(scope="session")
def run_clm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example script of transformers, which no package on PyPI holds."""
    path = Path(os.environ.get("HF_SOAP_RUN_CLM") or tmp_path_factory.mktemp("examples") / "run_clm.py")
    if not path.exists():
        repository = f"https://raw.githubusercontent.com/huggingface/transformers/{RUN_CLM_COMMIT}"
        try:
            with urllib.request.urlopen(
                f"{repository}/examples/pytorch/language-modeling/run_clm.py", timeout=20
            ) as answer:
                path.write_bytes(answer.read())
        except urllib.error.URLError as error:
            pytest.skip(f"cannot download run_clm.py ({error.reason}); set HF_SOAP_RUN_CLM to a copy of it")
    return path


def pytest_unconfigure() -> None:
    _caches.cleanup()

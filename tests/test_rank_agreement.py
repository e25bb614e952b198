"""Ranks that must decide alike: none may raise, or take another way, while the others wait for it."""

from pathlib import Path

import pytest
import ranks
import sharded_loading
import torch
from packaging import version

pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="fully_shard did not run on CPUs before"
)

SECONDS = 120
"""Until a process that waits says where, and fails."""

NAMES = list(sharded_loading.OPTIMIZERS)
SHAPES = {"thin": sharded_loading.THIN, "uneven": sharded_loading.UNEVEN}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all processes see."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    return tmp_path


FIRST = [((2, "local"), (1, "one")), ((2, "local"), (2, "owner")), ((3, "local"), (3, "owner"))]
PAIRS = [
    *FIRST,
    ((2, "local"), (3, "owner")),
    ((3, "local"), (1, "one")),
    ((3, "local"), (2, "local")),
    ((1, "one"), (2, "local")),
    ((2, "owner"), (3, "local")),
    ((3, "owner"), (2, "owner")),
]


@pytest.mark.parametrize("shapes", ["thin", "uneven"])
@pytest.mark.parametrize(
    ("before", "after"), [pair if pair in FIRST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_a_thin_matrix_gets_its_factors_back(
    before: tuple[int, str], after: tuple[int, str], shapes: str, shared: Path
) -> None:
    """One process said "basis_0 got nothing, wanted (1, 2, 2)"; of several, owners said so and the others waited."""
    settings = {"names": NAMES, "shapes": SHAPES[shapes], "seconds": SECONDS}
    ranks.run("sharded_loading.save_parts", before[0], shared, mode=before[1], **settings)
    ranks.run("sharded_loading.loads_parts", after[0], shared, mode=after[1], **settings)


@pytest.mark.parametrize("name", ["adamw", pytest.param("lion", marks=pytest.mark.slow), "soap"])
def test_exact_mars_trains_a_head_of_two_labels_on_three_ranks(name: str, shared: Path) -> None:
    """The third rank has no part of the head, found no previous weights, and left the others in their second pass."""
    ranks.run("sharded_exact.exact_mars_trains_a_head_alone", 3, shared, name=name, seconds=SECONDS)


@pytest.mark.parametrize("exact", ["true", "false"])
def test_exact_mars_trains_a_head_of_two_labels_in_the_trainer(exact: str, shared: Path) -> None:
    """As above, where SoapTrainer decides on the second pass; as one process, in float64."""
    settings = {"run": "a", "optim": "mars", "optim_args": f"exact={exact}", "seconds": SECONDS}
    ranks.run("sharded_exact.classifier_equals_one_process", 1, shared, sharded=False, **settings)
    ranks.run("sharded_exact.classifier_equals_one_process", 3, shared, sharded=True, **settings)


@pytest.mark.parametrize(
    ("count", "settings"),
    [(1, {}), (2, {"mode": "owner"}), pytest.param(3, {"mode": "owner"}, marks=pytest.mark.slow)],
    ids=["one", "two owners", "three owners"],
)
@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("soap", "precondition_frequency=2"),
        pytest.param("shampoo", "precondition_frequency=2,start_step=2", marks=pytest.mark.slow),
        pytest.param("mars", "variant=soap,precondition_frequency=2", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_resumes_a_head_of_two_labels(
    optim: str, options: str, count: int, settings: dict[str, str], shared: Path
) -> None:
    """Two ranks had a row of it each, which has no factors."""
    owner = ",shard_mode=owner" if settings else ""
    common = {"run": "a", "optim": optim, "seconds": SECONDS}
    ranks.run("sharded_exact.classifier_goes_on", 2, shared, sharded=True, optim_args=options, **common)
    ranks.run(
        "sharded_exact.classifier_goes_on",
        count,
        shared,
        sharded=count > 1,
        resumes=True,
        optim_args=options + owner,
        **common,
    )

"""Ranks that must decide alike: none may raise, or take another way, while the others wait for it."""

import dataclasses
import json
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

import pytest
import ranks
import sharded_changes
import sharded_loading
import torch
from packaging import version

pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="fully_shard did not run on CPUs before"
)

SECONDS = 120
"""Until a process that waits says where, and fails."""

PATIENCE = 20
"""Seconds after which a collective in which not all ranks are gives up."""

FIRST_FEW = 5
"""Problems after which a generated test ends: some take as long as a collective waits."""

NAMES = list(sharded_loading.OPTIMIZERS)
SHAPES = {"thin": sharded_loading.THIN, "uneven": sharded_loading.UNEVEN}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all processes see."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    return tmp_path


FIRST = [
    (((2, "local"), (1, "one")), "thin"),
    (((3, "local"), (3, "owner")), "uneven"),
]
"""For the fast tests."""

PAIRS = [
    *(pair for pair, _ in FIRST),
    ((2, "local"), (2, "owner")),
    ((2, "local"), (3, "owner")),
    ((3, "local"), (1, "one")),
    ((3, "local"), (2, "local")),
    ((1, "one"), (2, "local")),
    ((2, "owner"), (3, "local")),
    ((3, "owner"), (2, "owner")),
]


@pytest.mark.parametrize(
    ("before", "after", "shapes"),
    [
        pytest.param(*pair, shapes, marks=() if (pair, shapes) in FIRST else pytest.mark.slow)
        for pair in PAIRS
        for shapes in SHAPES
    ],
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


@pytest.mark.parametrize("exact", ["true", pytest.param("false", marks=pytest.mark.slow)])
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


def problems_of(cases: list[sharded_changes.Case], folder: Path, *, each: bool = True) -> Iterator[str]:
    """Saves and loads what cases want; yields what is not as it should be.

    Processes that do not agree are given up, and others go on with what follows.
    """
    for count in (1, 2, 3):
        wanted = {(c.optimizer, c.saved, c.source) for c in cases if sharded_changes.LAYOUTS[c.source] == count}
        layouts = sorted({source for *_, source in wanted})
        settings = {"folder": str(folder), "layouts": layouts, "only": sorted(map(list, wanted))}
        if count == 1:
            sharded_changes.save_states(**settings)
        elif layouts:
            ranks.run("sharded_changes.save_states", count, folder / "meet", seconds=SECONDS, **settings)
    for count in (1, 2, 3):
        mine = [case for case in cases if sharded_changes.LAYOUTS[case.target] == count]
        place: tuple[int, int] | None = (0, -1)
        while place is not None and place[0] < len(mine):
            place = yield from problems_from(place, mine, count, folder, each=each)


def problems_from(
    start: tuple[int, int], cases: list[sharded_changes.Case], count: int, folder: Path, *, each: bool
) -> Generator[str, None, tuple[int, int] | None]:
    """Loads from a case and parameter on; yields problems, and returns where others must go on, or None."""
    settings = {"folder": str(folder), "chosen": list(map(dataclasses.asdict, cases)), "start": start}
    settings |= {"report": str(folder / "report"), "each": each, "seconds": 20 * SECONDS, "patience": PATIENCE}
    for old in folder.glob("report-*"):
        old.unlink()
    crash = ""
    try:
        ranks.run("sharded_changes.load_states", count, folder / "meet", **settings)
    except AssertionError as error:  # not what a load raised: a process is gone
        crash = str(error)
    reports = [path.read_text().splitlines() for path in folder.glob("report-*")]
    results = [json.loads(line) for line in max(reports, key=len, default=[])]
    for number, which, _, problem in results:
        if problem:
            yield f"{cases[number]}, {named(which)}: {problem}"
    if results and results[-1][2] == "broken" and count > 1:
        return following((results[-1][0], results[-1][1]), loaded=not each)
    if crash:
        last = results[-1] if results else None
        culprit = following((last[0], last[1]), loaded=last[2] == "loaded" or not each) if last else start
        yield f"{cases[culprit[0]]}, {named(culprit[1])}: a process is gone: {crash}"
        return following(culprit, loaded=not each)
    return None


def following(place: tuple[int, int], *, loaded: bool) -> tuple[int, int]:
    """The place after one: the next parameter of the case, or the next case."""
    number, which = place
    ends = which + 1 == len(sharded_changes.SHAPES) or (loaded and which < 0)
    return (number + 1, -1) if ends else (number, which + 1)


def named(which: int) -> str:
    return "all parameters" if which < 0 else f"one of shape {sharded_changes.SHAPES[which]}"


def test_a_change_of_settings_loads_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    """Two of three ranks refused what the third, which has nothing of the matrix, loaded; others gathered by then."""
    problems = list(
        islice(problems_of(sharded_changes.sample(sharded_changes.cases()), tmp_path, each=False), FIRST_FEW)
    )
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("target", sharded_changes.LAYOUTS)
@pytest.mark.parametrize("optimizer", sharded_changes.OPTIONS)
def test_every_change_of_settings_loads_on_all_ranks_or_on_none(optimizer: str, target: str, tmp_path: Path) -> None:
    chosen = [c for c in sharded_changes.cases() if (c.optimizer, c.target) == (optimizer, target)]
    problems = list(islice(problems_of(chosen, tmp_path), FIRST_FEW))
    assert not problems, "\n\n".join(problems)


PRESENCE = ["an_expert_that_one_rank_uses", "a_rank_that_has_no_gradients", "a_parameter_that_is_thawed"]


@pytest.mark.parametrize("function", PRESENCE)
def test_gradients_that_some_ranks_lack(function: str, shared: Path) -> None:
    ranks.run(f"sharded_presence.{function}", 3, shared, names=["soap", "mars"], seconds=SECONDS, patience=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("function", PRESENCE)
def test_gradients_that_some_ranks_lack_with_every_optimizer(function: str, count: int, shared: Path) -> None:
    settings = {"names": ["shampoo", "kl_shampoo", "mars_soap"], "seconds": SECONDS, "patience": PATIENCE}
    ranks.run(f"sharded_presence.{function}", count, shared, **settings)


@pytest.mark.parametrize("mode", ["local", "owner"])
def test_a_setting_that_is_refused_in_mid_run_is_refused_by_all(mode: str, shared: Path) -> None:
    """Ranks that have nothing of a matrix stepped on."""
    settings = {"mode": mode, "seconds": SECONDS, "patience": PATIENCE}
    ranks.run("sharded_presence.a_setting_that_does_not_fit_in_mid_run", 3, shared, **settings)


def test_state_that_does_not_fit_one_device_stops_all(shared: Path) -> None:
    """One rank said so before the first step, and the others waited in it."""
    ranks.run("sharded_presence.state_that_does_not_fit_one_rank", 3, shared, seconds=SECONDS, patience=PATIENCE)

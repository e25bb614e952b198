"""Steps that a CUDA graph holds; on a CPU a recording of what they send to the device plays the graph."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from family import close
from graphs import Recording, capture, out_of_memory
from helpers import FULL_RANK, assert_same, gradient, parameters, snapshot, train
from torch import Tensor
from torch.nn import Parameter

from hf_soap import MARS, SOAP, updates
from hf_soap.blocks import Chunk
from hf_soap.failures import Failures

FREQUENCY = 4
soap = partial(SOAP, precondition_frequency=FREQUENCY)
mars = partial(MARS, precondition_frequency=FREQUENCY)
CAPTURABLE = {
    "soap": soap,
    "staggered": partial(soap, stagger=True),
    "one-sided": partial(soap, one_sided=True, factorized=True),
    "kl": partial(soap, kl=True, normalize_grads=True),
    "padded blocks": partial(soap, block_size=4),
    "tolerant": partial(soap, refresh_tol=0.3),
    "uncorrected": partial(soap, correct_bias=False, nonfinite="off"),
    "mars": mars,
    "mars, unchecked": partial(mars, nonfinite="off"),
    "mars-lion": partial(mars, variant="lion", optimize_1d=True),
    "mars-shampoo": partial(mars, variant="shampoo"),
    "mars-m": partial(mars, variant="m", lr_1d=0.05),
    "mars-soap": partial(mars, variant="soap"),
}
makers = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in CAPTURABLE.items()])


class Run:
    """A run with one place for each gradient and for the learning rate, as graphs need."""

    def __init__(self, make: Callable[..., Any], **options: Any) -> None:
        self.params = parameters(FULL_RANK, torch.float64)
        self.lr = torch.tensor(0.01, dtype=torch.float64)
        self.optimizer = make(self.params, lr=self.lr, **options)
        for param in self.params:
            param.grad = torch.zeros_like(param)

    def fill(self, step: int, *, bad: bool = False) -> None:
        """Puts the gradients of a step in their place."""
        self.lr.fill_(0.01 * (1 + step % 3))
        for place, param in enumerate(self.params):
            assert param.grad is not None
            param.grad.copy_(gradient(param, place, step))
        if bad:
            assert self.params[1].grad is not None
            self.params[1].grad.view(-1)[2] = torch.nan

    def step(self, step: int, *, bad: bool = False) -> None:
        self.fill(step, bad=bad)
        self.optimizer.step()

    def owned(self) -> list[Tensor]:
        """What a step changes."""
        tensors: list[Tensor] = [param.detach() for param in self.params]
        for state in self.optimizer.state.values():
            tensors += state.values()
        tally = self.optimizer._guard._tally
        return tensors + ([] if tally is None else [tally._skipped, tally._in_a_row])

    def capture(self, monkeypatch: pytest.MonkeyPatch, *, steps: int = 1) -> Recording:
        """Captures steps that, unlike in a graph, run meanwhile; what they changed is put back."""
        before = [tensor.clone() for tensor in self.owned()]
        with capture(monkeypatch) as recording:
            for _ in range(steps):
                self.optimizer.step()
        for tensor, value in zip(self.owned(), before, strict=True):
            tensor.copy_(value)
        return recording

    def replay(self, graph: Recording, step: int, *, bad: bool = False) -> None:
        self.fill(step, bad=bad)
        graph.replay()
        self.optimizer.after_replay()


def twice(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run, Recording]:
    """Two runs after three steps, and the fourth step of the second, captured."""
    runs = [Run(make, capturable=True) for _ in range(2)]
    for step in range(3):
        for run in runs:
            run.step(step)
    return runs[0], runs[1], runs[1].capture(monkeypatch)


@makers
@pytest.mark.parametrize("bad", [(), (9, 14, 15, 20)], ids=["finite", "bad"])
def test_replays_are_steps(make: Callable[..., Any], bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: with a schedule, refreshes and their stagger, and steps that are left out."""
    bad = () if "nonfinite" in getattr(make, "keywords", {}) else bad
    eager, graphed, graph = twice(make, monkeypatch)
    for step in range(3, 27):
        eager.step(step, bad=step in bad)
        graphed.replay(graph, step, bad=step in bad)
    assert_same(snapshot(graphed.optimizer, graphed.params), snapshot(eager.optimizer, eager.params))
    assert graphed.optimizer.skipped_steps == eager.optimizer.skipped_steps == len(bad)


@makers
def test_a_graph_reads_only_what_stays(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was handed a constant from a cache, which forgot it."""
    _, run, graph = twice(make, monkeypatch)
    stays = [*run.owned(), *(param.grad for param in run.params), run.lr]
    stays.append(updates._very_late(torch.device("cpu")))
    assert graph.foreign() <= {tensor.untyped_storage().data_ptr() for tensor in stays if tensor is not None}


def bases_of(run: Run) -> list[Tensor]:
    return [state["basis_0"] for state in run.optimizer.state.values() if "basis_0" in state]


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("calls", [1, 2])
def test_several_steps_to_a_call_refresh_late_and_not_never(
    steps: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in a graph, or replays to a call, jumped over the updates that a refresh was due behind."""
    run = Run(soap, capturable=True)
    for step in range(4):
        run.step(step)
    graph, refreshes = run.capture(monkeypatch, steps=steps), 0
    for _ in range(24 // (steps * calls)):
        before = copy.deepcopy(bases_of(run))
        for _ in range(calls):
            graph.replay()
        run.optimizer.after_replay()
        refreshes += not all(map(torch.equal, before, bases_of(run)))
    assert refreshes == 24 // max(FREQUENCY, steps * calls)


@makers
def test_it_is_the_same_run_with_counts_on_the_device(make: Callable[..., Any]) -> None:
    one, other = Run(make, capturable=True), Run(make)
    for step in range(13):
        bad = step in (0, 4, 9) and other.optimizer.param_groups[0]["nonfinite"] == "skip"
        one.step(step, bad=bad)
        other.step(step, bad=bad)
    close(one.params, other.params)


def test_steps_between_replays_count(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, graphed, graph = twice(soap, monkeypatch)
    for step in range(3, 20):
        eager.step(step)
        if step % 3:
            graphed.replay(graph, step)
        else:
            graphed.step(step)
    assert_same(snapshot(graphed.optimizer, graphed.params), snapshot(eager.optimizer, eager.params))


@pytest.mark.parametrize(("make", "number"), [(soap, 2), (mars, 1)])
def test_the_first_steps_are_no_graph(make: Callable[..., Any], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make, capturable=True)
    run.fill(0)
    before = copy.deepcopy(run.params)
    for _ in range(number):
        with pytest.raises(RuntimeError, match="take steps with all gradients outside"), capture(monkeypatch):
            run.optimizer.step()
        assert_same(run.params, before)
        run.optimizer.step()
        before = copy.deepcopy(run.params)
    run.optimizer.step()
    run.capture(monkeypatch)


def test_a_parameter_without_its_first_gradient_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(soap, capturable=True)
    late, run.params[0].grad = run.params[0].grad, None
    for step in range(3):
        for place, param in enumerate(run.params[1:]):
            param.grad = gradient(param, place, step)
        run.optimizer.step()
    run.params[0].grad = late
    with pytest.raises(RuntimeError, match="first of a parameter"), capture(monkeypatch):
        run.optimizer.step()


def test_a_step_that_is_not_capturable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(soap)
    with pytest.raises(RuntimeError, match="set capturable=True"), capture(monkeypatch):
        run.optimizer.step()


def test_a_learning_rate_goes_on_in_its_place_after_a_load() -> None:
    run, other = Run(soap, capturable=True), Run(soap, capturable=True)
    run.step(1)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] is other.lr
    assert other.lr == run.lr


def test_a_graph_that_has_gone_stale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(soap, capturable=True)
    for step in range(3):
        run.step(step)
    graph = run.capture(monkeypatch)
    run.params[0].requires_grad_(False)
    run.step(3)
    with pytest.raises(RuntimeError, match="whose state is elsewhere by now"):
        run.replay(graph, 4)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no captured step"):
        run.replay(graph, 4)


def test_settings_that_a_graph_would_not_see_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(FULL_RANK)
    optimizer = soap(params, lr=0.01, capturable=True)
    train(optimizer, params, range(3))
    with capture(monkeypatch) as graph:
        optimizer.step()
    graph.replay()
    optimizer.after_replay()
    group = optimizer.param_groups[0]
    for name, value in (("lr", 0.02), ("lr", torch.tensor(0.01)), ("weight_decay", 0.5), ("betas", (0.8, 0.9))):
        before, group[name] = group[name], value
        with pytest.raises(RuntimeError, match=rf"got {name}=.* in param group 0 .*make lr a tensor on the device"):
            optimizer.after_replay()
        group[name] = before
    optimizer.after_replay()
    group["lr"] = torch.tensor(0.02, device="meta")
    with pytest.raises(RuntimeError, match="got a learning rate on meta in a step to capture"), capture(monkeypatch):
        optimizer.step()


def test_another_tensor_as_learning_rate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, graph = twice(soap, monkeypatch)
    run.replay(graph, 3)
    run.optimizer.param_groups[0]["lr"] = run.lr.clone()
    with pytest.raises(RuntimeError, match="got lr='a tensor at"):
        run.replay(graph, 4)


def test_after_replay_wants_a_captured_step() -> None:
    with pytest.raises(RuntimeError, match="one call after each replay"):
        Run(soap, capturable=True).optimizer.after_replay()


@pytest.mark.parametrize("make", [soap, mars])
def test_replays_do_not_skip_for_ever(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(partial(make, max_skipped_in_a_row=3), capturable=True)
    for step in range(3):
        run.step(step)
    graph = run.capture(monkeypatch)
    raised = []
    for _ in range(12):
        try:
            run.replay(graph, 3, bad=True)
        except FloatingPointError as error:  # whoever catches it may go on
            raised.append(str(error))
    assert len(raised) == 4
    assert all("3 steps in a row" in text for text in raised)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SOAP, {"state_dtype": "bfloat16"}),
        (SOAP, {"pack_factors": True}),
        (SOAP, {"shard_mode": "owner"}),
        (SOAP, {"include_current": True}),
        (SOAP, {"overlap_refresh": True}),
        (MARS, {"exact": True}),
    ],
)
def test_what_cannot_be_captured_is_refused(make: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"got {name}=.* with capturable=True, wanted {name}="):
        make(parameters(), capturable=True, **options)


def test_all_groups_are_captured_or_none() -> None:
    one, *others = parameters()
    with pytest.raises(ValueError, match="in all or none"):
        SOAP([{"params": [one], "capturable": True}, {"params": others}])


@pytest.mark.parametrize("frequency", [1, 2, FREQUENCY])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_counts_go_through_a_checkpoint_to_either_side(frequency: int, before: bool, after: bool) -> None:
    """A run that was captured goes on without a graph, and the other way round; a step left out refreshes nothing."""
    one, other = (
        Run(partial(SOAP, precondition_frequency=frequency), capturable=graphs) for graphs in (before, after)
    )
    for step in range(1 + 2 * frequency):
        one.step(step)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    with torch.no_grad():
        for param, value in zip(other.params, one.params, strict=True):
            param.copy_(value)
    for step in range(1 + 2 * frequency, 14):
        for run in (one, other):
            run.step(step, bad=step in (1 + 2 * frequency, 12))
    close(one.params, other.params)


def test_tensors_that_start_anew_are_refreshed_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for capturable in (False, True):
        run = Run(soap, capturable=capturable)
        for step in range(14):
            if step == 6:
                with monkeypatch.context() as patch:
                    patch.setattr("hf_soap.rules.soap.Soap.update", out_of_memory)
                    with pytest.raises(torch.OutOfMemoryError):
                        run.step(step)
            else:
                run.step(step)
        runs.append(run.params)
    close(*runs)


def batch_and_loss(weights: list[Parameter], batch: Tensor) -> Tensor:
    hidden = torch.tanh(batch @ weights[0])
    return (hidden @ weights[1] + weights[2]).square().mean()


@pytest.mark.cuda
@makers
def test_a_graph_of_the_whole_training_step(make: Callable[..., Any]) -> None:
    def run(*, graphed: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(48, 64), (64, 32), (32,)]
        params = [Parameter(torch.randn(shape, generator=generator).cuda()) for shape in shapes]
        batches = [torch.randn(16, 48, generator=generator).cuda() for _ in range(24)]
        lr = torch.tensor(0.01, device="cuda")
        optimizer = make(params, lr=lr, capturable=True)
        batch = torch.zeros(16, 48, device="cuda")
        graph = torch.cuda.CUDAGraph()
        for step, fresh in enumerate(batches):
            batch.copy_(fresh)
            lr.fill_(0.01 / (1 + step))
            if graphed and step == 3:
                optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    batch_and_loss(params, batch).backward()
                    optimizer.step()
            if graphed and step >= 3:
                graph.replay()
                optimizer.after_replay()
                continue
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                optimizer.zero_grad(set_to_none=True)
                batch_and_loss(params, batch).backward()
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
        return [param.detach().cpu() for param in params]

    for one, other in zip(run(graphed=True), run(graphed=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@makers
@pytest.mark.parametrize("by_products", [False, True])
def test_a_rule_leaves_its_device_neither_to_read_nor_to_write(
    make: Callable[..., Any], by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without numbers play a GPU's: what would wait for one, or mix it with the host's, raises."""
    monkeypatch.setattr("hf_soap.bases._solves_by_products", lambda factor: by_products)
    monkeypatch.setattr("hf_soap.failures.DEFERS", {"meta"})
    optimizer, device = make(params := parameters(FULL_RANK), capturable=True), torch.device("meta")
    group = optimizer.param_groups[0]
    for plan in {optimizer.plan_of(group, param) for param in params}:
        state = plan.allocate(2, dtype=torch.float32, device=device)
        grad = torch.zeros(2 * plan.layout.blocks, *plan.layout.block, device=device)
        counts = torch.full((2,), 8.0, dtype=torch.float64, device=device)
        chunk = Chunk(plan.layout, (8, 9), (0, 1), failures=Failures(), counts=counts, later=True)
        plan.rule.seed(grad, state, chunk)
        assert plan.rule.update(grad, state, chunk).device == device
        if not group.get("refresh_tol"):  # by which the host decides
            plan.rule.refresh(state, replace(chunk, t=(8, 8), index=(0, 0)))

"""Numbers that go wrong on one of several ranks, run in every process; see ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import OPTIMIZERS, assert_equal, network, owned, same_gradients, shard, whole
from torch import Tensor, nn

from hf_soap import SOAP
from hf_soap.engine.optimizer import BlockOptimizer


def made(mode: str, name: str) -> tuple[nn.Sequential, BlockOptimizer]:
    """A network, sharded unless its refreshes are split, and its optimizer."""
    model = network() if mode == "split" else shard(network())
    if mode == "owner":
        return model, owned(name, model.parameters())
    optimizer = OPTIMIZERS[name](model.parameters())
    for group in optimizer.param_groups:
        group["distributed_refresh"] = mode == "split"
    return model, optimizer


def spoil_on_one_rank(model: nn.Module) -> None:
    """Puts a NaN into the part that rank 1 has of the first gradient."""
    for param in model.parameters():
        part = param.grad.to_local()  # type: ignore[union-attr]
        if dist.get_rank() == 1 and part.numel():
            part.view(-1)[0] = float("nan")
            return


def a_streak_on_one_rank_is_an_error_on_all(names: list[str]) -> None:
    """After ten skipped steps everybody raises, and everybody goes on from where it was."""
    for mode in ("local", "owner"):
        for name in names:
            model, optimizer = made(mode, name)
            for group in optimizer.param_groups:
                group["max_skipped_in_a_row"] = 10
            same_gradients(model, optimizer, range(3))
            before = whole(model)
            raised: list[bool] = []
            for _ in range(10):
                spoil_on_one_rank(model)
                try:
                    optimizer.step()
                except FloatingPointError as error:
                    raised.append("now in" in str(error))
            assert raised == [dist.get_rank() == 1]  # who has the bad part names it
            assert optimizer.skipped_steps == 10
            assert_equal(whole(model), before, f"{mode}, {name}")
            same_gradients(model, optimizer, range(3, 5))
            assert optimizer.skipped_steps == 10


def a_decomposition_that_fails_on_one_rank(names: list[str]) -> None:
    """The others neither wait for ever nor, where they share its result, drift apart from it."""
    eigh, qr = torch.linalg.eigh, torch.linalg.qr

    def broken(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    for mode in ("local", "owner", "split"):
        culprit = 0 if mode == "split" else 1  # with two ranks the first gets all of what is split here
        for name in names:
            model, optimizer = made(mode, name)
            same_gradients(model, optimizer, range(3))
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() == culprit:
                    patch.setattr(torch.linalg, "eigh", broken)
                    patch.setattr(torch.linalg, "qr", broken)
                same_gradients(model, optimizer, range(3, 9))
            failed: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(failed, optimizer.failed_refreshes)
            assert failed[culprit] > 0, f"{mode}, {name}"
            if mode == "split" and "late" not in name:
                assert len(set(failed)) == 1, f"{name}: {failed}"  # all got the same results
            elif mode != "split":
                assert not any(number for rank, number in enumerate(failed) if rank != 1), f"{mode}, {name}: {failed}"
            same_gradients(model, optimizer, range(9, 12))
            weights = whole(model)
            assert all(value.isfinite().all() for value in weights.values()), f"{mode}, {name}"
            if mode == "split" and "late" not in name:
                everyones: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyones, weights)
                for other in everyones:
                    assert_equal(other, weights, name)
    assert (torch.linalg.eigh, torch.linalg.qr) == (eigh, qr)


def a_refused_step_counts_nowhere() -> None:
    """Ranks without a part of a parameter kept the count of a step that was skipped."""
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Linear(32, 1, bias=False), nn.Linear(32, 8, bias=False)))
    optimizer = SOAP(model.parameters(), lr=1e-3)
    for step in range(4):
        for param in model.parameters():
            param.grad = torch.full_like(param, float("nan") if step == 2 else 1.0 + step)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert [float(optimizer.state[param]["step"]) for param in model.parameters()] == [3.0, 3.0]

"""The optimizers whose bare steps ``measure_gpu.py`` compares: ours, torch's, and those of other packages."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

Make = Callable[[list[Parameter]], Any]


def unpack_peers(folder: Path, to: Path) -> None:
    """Makes other optimizers importable without an installation.

    Args:
        folder: It holds wheels in pure Python, such as those of heavyball, pytorch_optimizer and
            ista_daslab_optimizers (DASH), and files such as the soap.py of SOAP's authors.
        to: Folder for the contents of the wheels.
    """
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(to)
    sys.path[:0] = [str(to), str(folder)]


def contenders(frequencies: Sequence[int]) -> dict[str, Make]:
    """Returns constructors by name: ours, torch's, and those peers that can be imported.

    Args:
        frequencies: Steps between refreshes. Most options are measured with the first number only.
    """
    from hf_soap import MARS, SOAP, Shampoo

    found: dict[str, Make] = {
        "AdamW (fused)": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=p[0].is_cuda),
        "MARS": functools.partial(MARS, lr=1e-4),
    }
    soap = functools.partial(SOAP, refresh_growth=0.0)  # as after the first few hundred updates
    if hasattr(torch.optim, "Muon"):
        found["torch Muon + AdamW"] = _torch_muon
    once: dict[str, tuple[Any, dict[str, Any]]] = {
        "SOAP, bf16 rotations": (soap, {"matmul_dtype": "bfloat16"}),
        "SOAP, staggered": (soap, {"stagger": True}),
        "KL-SOAP": (soap, {"kl": True}),
        "Shampoo": (Shampoo, {}),
        "Shampoo by Newton's method": (Shampoo, {"root_method": "newton"}),
        "SOAP, bf16 state, packed": (soap, {"state_dtype": "bfloat16", "pack_factors": True}),
    }
    peers = _peers()
    for f in frequencies:
        ours: dict[str, tuple[Any, dict[str, Any]]] = {
            "SOAP": (soap, {}),
            "SOAP, tf32 rotations": (soap, {"matmul_dtype": "tf32"}),
        }
        for name, (cls, options) in (ours | (once if f == frequencies[0] else {})).items():
            found[f"{name}, f={f}"] = functools.partial(cls, lr=1e-4, precondition_frequency=f, **options)
        for name, make in peers.items():
            found[f"{name}, f={f}"] = functools.partial(make, precondition_frequency=f)
    return found


def _peers() -> dict[str, Callable[..., Any]]:
    """Returns the optimizers of other packages that are there, each a function of parameters and frequency."""
    found: dict[str, Callable[..., Any]] = {}
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # its compilation takes minutes
        found["heavyball SOAP"] = functools.partial(heavyball.SOAP, lr=1e-4, max_precond_dim=10000)
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        found["pytorch_optimizer SOAP"] = functools.partial(pytorch_optimizer.SOAP, lr=1e-4)
    if importlib.util.find_spec("soap"):
        import soap

        found["official SOAP"] = functools.partial(soap.SOAP, lr=1e-4)
    if importlib.util.find_spec("ista_daslab_optimizers") and importlib.util.find_spec("triton"):
        found["DASH + AdamW"] = _dash
        found["Shampoo in DASH's blocks + AdamW"] = _shampoo_in_blocks
    return found


def _torch_muon(params: list[Parameter]) -> Any:
    return _WithAdamW(
        params, lambda p: p.dim() == 2 and max(p.shape) < 20_000, functools.partial(torch.optim.Muon, lr=1e-4)
    )


def _dash(params: list[Parameter], precondition_frequency: int) -> Any:
    """DASH cuts matrices into square blocks, and takes only those with a side that is whole blocks."""
    name = "ista_daslab_optimizers"
    if name not in sys.modules:
        # The package without its __init__, which imports compiled extensions that DASH does not need.
        spec = importlib.util.find_spec(name)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = types.ModuleType("wandb")  # imported, and used only to log
    from ista_daslab_optimizers.dash import DashConfig, DashGpu, DashInverseRootMethodType

    block = _block(params)
    config = DashConfig(
        inv_root_freq=precondition_frequency, inv_root_method=DashInverseRootMethodType.NDB, block_size=block
    )
    make = functools.partial(DashGpu, lr=1e-4, weight_decay=0.0, config=config)
    return _WithAdamW(params, functools.partial(_has_whole_blocks, block=block), make)


def _shampoo_in_blocks(params: list[Parameter], precondition_frequency: int) -> Any:
    from hf_soap import Shampoo

    block = _block(params)
    make = functools.partial(Shampoo, lr=1e-4, precondition_frequency=precondition_frequency, block_size=block)
    return _WithAdamW(params, functools.partial(_has_whole_blocks, block=block), make)


def _block(params: list[Parameter]) -> int:
    """Returns the shortest side of a matrix, which divides the other sides of GPT-2."""
    return min(min(p.shape) for p in params if p.dim() == 2)


def _has_whole_blocks(param: Parameter, *, block: int) -> bool:
    return param.dim() == 2 and any(side % block == 0 for side in param.shape)


class _WithAdamW:
    """Two optimizers in one: some parameters go to the first, all others to fused AdamW."""

    def __init__(self, params: list[Parameter], takes: Callable[[Parameter], bool], make: Make) -> None:
        taken = [p for p in params if takes(p)]
        rest = [p for p in params if not takes(p)]
        self.first = make(taken)
        self.adamw = torch.optim.AdamW(rest, lr=1e-4, fused=rest[0].is_cuda)

    def step(self) -> None:
        self.first.step()
        self.adamw.step()

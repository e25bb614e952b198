"""The arithmetic of float32 matrix products: the fastest exact one, and TF32 or bf16 only on request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch

from hf_soap.linalg import processor

logger = logging.getLogger(__name__)

EXACT, REDUCED = "ieee", {"cpu": "bf16", "cuda": "tf32"}
"""Names of torch's settings for products of float32 matrices: in float32, or in a reduced precision that is faster."""

SMALLEST, LARGEST = 128, 8192
"""Bounds on the longest side of matrices that oneDNN may multiply instead of MKL. It starts too slowly for smaller
matrices. For larger ones it may split sums in a way that depends on how many matrices are multiplied at once."""

FLAT = 16
"""MKL multiplies matrices with at most this many rows, such as those of LoRA, if only their shorter side has a factor.
There it is up to twice as fast as oneDNN."""


class float32_products:
    """Multiplies float32 matrices in float32 within the context, whatever the program has set for its model.

    Factors need that precision: if eigenvalues differ by a factor of 1e7, TF32 loses the small ones. oneDNN multiplies
    large matrices where :func:`prefers_onednn` says so.

    Args:
        block: Shape of the blocks that the matrices belong to.
        device: Where the products are computed.
        sides: Modes of the blocks that have factors.
        reduced: Let a GPU use TF32, for products that do not concern factors.
    """

    def __init__(
        self, block: Sequence[int], device: torch.device, *, sides: Sequence[int] = (), reduced: bool = False
    ) -> None:
        self._settings = _settings(device.type)
        self._wanted = _wanted(tuple(block), device, tuple(sides), reduced) if self._settings is not None else EXACT

    def __enter__(self) -> None:
        if self._settings is not None:
            self._before = self._settings.fp32_precision
            if self._before != self._wanted:
                self._settings.fp32_precision = self._wanted

    def __exit__(self, *error: object) -> None:
        if self._settings is not None and self._before != self._wanted:
            self._settings.fp32_precision = self._before


@cache
def _wanted(block: tuple[int, ...], device: torch.device, sides: tuple[int, ...], reduced: bool) -> str:
    """Returns torch's setting for the products of these blocks."""
    flat = sides == (0,) and block[0] <= FLAT
    usual = SMALLEST <= max(block, default=0) <= LARGEST and not flat
    fast = reduced if device.type == "cuda" else usual and prefers_onednn()
    kernel = {"cpu": "oneDNN", "cuda": "TF32"}[device.type] if fast else "torch's default kernel"
    logger.debug("float32 products of %s by %s: %s", block, kernel, processor.instructions(device))
    return REDUCED[device.type] if fast else EXACT


@cache
def allows_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrices are worth multiplying on a device. Warns, once per process, if they are not."""
    if device.type != "cpu" or processor.multiplies_bfloat16():
        logger.debug("bfloat16 products on %s: %s", processor.name(device), processor.instructions(device))
        return True
    logger.warning(
        "matmul_dtype='bfloat16' computes in float32 here: the processor (%s, %s) has no instructions for bfloat16 "
        "products, which would take several times as long. Use matmul_dtype='float32', or a processor with "
        "AVX512-BF16 or AMX.",
        processor.name(device),
        processor.instructions(device),
    )
    return False


def prefers_onednn() -> bool:
    """Whether oneDNN, in torch's bf16 mode, multiplies float32 matrices in float32 and faster than torch's default.

    It does on AMD processors with AVX512, where it is about twice as fast as MKL. On Intel's, MKL uses AVX512 too: it
    is as fast as oneDNN up to sides of 1024, and two to three times as fast at 3072. On processors without AVX512,
    torch does not pass products to oneDNN.
    """
    return processor.onednn_takes_bfloat16() and not processor.is_intel() and onednn_is_exact()


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's bf16 mode computes products of float32 matrices in float32 on this processor."""
    settings = _settings("cpu")
    generator = torch.Generator(device="cpu").manual_seed(0)
    before = settings.fp32_precision
    try:
        for size in (SMALLEST, 4 * SMALLEST):
            one, other = (torch.rand(2, size, size, generator=generator, device="cpu") for _ in range(2))
            settings.fp32_precision = REDUCED["cpu"]
            got = torch.bmm(one, other).double()
            want = one.double() @ other.double()
            # All entries are positive: the relative error is 1e-6 in float32, and 1e-3 with bf16 entries.
            if ((got - want).abs() > 2e-5 * want).any():
                return False
    finally:
        settings.fp32_precision = before
    return True


class _Legacy:
    """Torch's single setting for all devices before 2.9, under the names of the newer settings."""

    NAMES: ClassVar = {EXACT: "highest", "tf32": "high", "bf16": "medium"}

    @property
    def fp32_precision(self) -> str:
        now = torch.get_float32_matmul_precision()
        return next(name for name, legacy in self.NAMES.items() if legacy == now)

    @fp32_precision.setter
    def fp32_precision(self, name: str) -> None:
        torch.set_float32_matmul_precision(self.NAMES[name])


@cache
def _settings(device: str) -> Any:
    """Returns the object with torch's setting for products on a kind of device; None for a kind without one."""
    if device not in REDUCED:
        return None
    backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
    matmul = getattr(backend, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else _Legacy()

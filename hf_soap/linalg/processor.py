"""What the processor can do. Kernels are chosen by that, not by times, so that a resumed run takes the same ones."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def name(device: torch.device) -> str:
    """Returns the model name of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instructions(device: torch.device) -> str:
    """Returns the instructions that products can use.

    Returns:
        ``"AVX512+BF16"`` or ``"AMX"`` for a CPU of x86 with bfloat16 products, torch's name (such as ``"AVX512"``,
        ``"AVX2"``, ``"DEFAULT"``) for another CPU, and the compute capability of a GPU.
    """
    if device.type == "cuda":
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    usual = torch.backends.cpu.get_cpu_capability()
    if usual != "AVX512" or not multiplies_bfloat16():
        return usual
    return "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512+BF16"


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 matrices.

    oneDNN accepts bfloat16 on every x86 processor with AVX512, but needs 4 times as long as for float32 on those
    without AVX512-BF16 or AMX.
    """
    return onednn_takes_bfloat16() and (torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported())


@cache
def onednn_takes_bfloat16() -> bool:
    """Whether torch passes bfloat16 products to oneDNN, which ``ONEDNN_MAX_CPU_ISA`` can prevent.

    If not, torch's own loop is more than ten times as slow as float32, and torch's bf16 mode does not pass float32
    products to oneDNN either.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_intel() -> bool:
    """Whether the CPU is one of Intel's: MKL uses AVX512 on these only."""
    return "GenuineIntel" in (_cpuinfo().get("vendor_id") or platform.processor())


@cache
def _cpuinfo() -> dict[str, str]:
    """Returns what Linux says of the first CPU; nothing on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().partition("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}

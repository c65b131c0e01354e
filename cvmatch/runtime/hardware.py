"""The device of this process, its threads, and its memory."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

_MATRIX_UNITS = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
"""Capabilities of a CPU, as torch names them, with which it multiplies bf16 faster than fp32."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def device() -> torch.device:
    """Return the GPU of this process if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which a device multiplies fastest: bf16 if it has units for it, else fp32.

    A CPU without them emulates bf16: a convolution may then take a thousand times as long as in
    fp32 (docs/decisions.md#scoring-in-bf16).
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
        bf16 = any(capable.get(unit) for unit in _MATRIX_UNITS)
    return torch.bfloat16 if bf16 else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Return a context in which a device computes in the type that it multiplies fastest."""
    dtype = fastest_dtype(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the block: the last bits of a product depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 2 GiB of what torch frees on a CPU, and not fault it in again.

    For processes that run many steps or batches (docs/decisions.md#freed-memory). It does nothing
    with a GPU, or where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not torch.cuda.is_available():
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # As large as a thread's heap: an empty one of less padding is given back whole.
        mallopt(_M_TOP_PAD, 64 * 2**20)

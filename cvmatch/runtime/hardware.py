"""What torch runs on: the device of this process, its threads, and its memory."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def device() -> torch.device:
    """The GPU of this process if there is one, else the CPU (and `keep_memory`)."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_memory()
    return torch.device("cpu")


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
def keep_memory() -> None:
    """Let malloc keep the large buffers that torch frees on a CPU, up to 2 GiB of them.

    Given back to the system at once, as glibc does with more than 128 kB, they come back as new
    pages in the next step: a training step of the demo's matcher took 0.39 s, with this 0.29 s.
    Ray calls actors in threads, whose memory malloc keeps in heaps of 64 MiB: an empty one is given
    back whole, unless the padding is as large. Segmentation, batches of 32: 617 new pages a row and
    0.72 of a bare loop's speed, with this 45 pages and 1.04.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc only
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)

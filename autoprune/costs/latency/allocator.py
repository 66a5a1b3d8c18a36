"""The C library's allocator in one known state, while something is timed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # numbers of mallopt(3)
_ALL = -1
_MIB = 2**20


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let glibc keep freed memory, and take no block from the system that it would return at once.

    Otherwise it returns the memory of large activations after each of them, or after each pass, and requests it again
    page by page, depending on earlier runs. A ResNet-20 at batch 32 took 38 ms in place of 24 ms; a MobileNetV2 with
    activations of 75 MB took 1,364 ms in place of 453 ms, and pruned ones were slowed down by other factors, which
    differed by a third from one process to the next.

    Afterwards free memory returns to the system, and the thresholds are those of any process that has freed one large
    tensor, the highest that glibc sets itself: 32 MiB for separate blocks, 64 MiB for memory that it keeps. An
    allocator that the user has set up by environment variables stays as it is; so do those of other C libraries.
    """
    glibc = _glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, _ALL)
    try:
        yield
    finally:
        glibc.mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        glibc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        glibc.mallopt(_MMAP_MAX, 65_536)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and the user has not chosen how it allocates."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Windows has no such function, others no such name
        return None
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]
    if own or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return ctypes.CDLL(None)

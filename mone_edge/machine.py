"""What the machine has. Knows nothing about models."""

import os
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def memory_bytes() -> int:
    """Main memory in all, used or not; more than there can be where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**62


def cores() -> int:
    """Cores that this process may use.

    A second hardware thread of the same core is not counted, as llama.cpp's own programs do not:
    the two take turns at its arithmetic. Where the system does not tell them apart, all count.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core(processor) for processor in os.sched_getaffinity(0)})


def _core(processor: int) -> str:
    """A name for the core that a processor belongs to."""
    try:
        return Path(_TOPOLOGY.format(processor)).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return str(processor)

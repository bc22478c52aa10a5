"""What the machine has. Knows nothing about models."""

import os


def memory_bytes() -> int:
    """Main memory in all, used or not; more than there can be where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**62

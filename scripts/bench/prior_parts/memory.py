"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> float:
    """Reset the peak to the memory in use now, and return that in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(start: float) -> float:
    """Return the peak in MB since ``reset_peak`` returned ``start``.

    Linux counts the pages of its peak and of the memory in use separately, and in batches.
    """
    return max(start, _status("VmHWM"))


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

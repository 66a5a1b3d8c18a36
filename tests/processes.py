"""Processes that the tests start, known by a variable that children inherit."""

import os
from pathlib import Path

MARK = f"AUTOPRUNE_TESTS={os.getpid()}"
_ALLOWED = ("resource_tracker", "forkserver")  # Python's own, which end with this process


def running() -> dict[int, str]:
    """Processes that tests started and that have not ended, with their commands; none where there is no /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()  # empty once it has ended and only waits to be asked
            if MARK.encode() in (folder / "environ").read_bytes().split(b"\0") and command:
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")[:200]
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return {pid: command for pid, command in found.items() if not any(name in command for name in _ALLOWED)}

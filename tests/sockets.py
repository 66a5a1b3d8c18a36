"""Addresses that processes listen on, by /proc."""

import os
from pathlib import Path

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same in IPv6, and ::1."""

_LISTENING = "0A"


def listening_of(processes):
    """Addresses and ports, in hexadecimal, that the processes with these numbers listen on."""
    inodes = {inode for process in processes for inode in _inodes(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in inodes:
                found.add(tuple(fields[1].split(":")))
    return found


def _inodes(process):
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            yield target[8:-1]

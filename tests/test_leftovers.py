"""The check at the end of all tests would see what is left running."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import running

ORPHAN = """
from subprocess import DEVNULL, Popen
print(Popen(["sleep", "60"], start_new_session=True, stdout=DEVNULL, stderr=DEVNULL).pid)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are found in /proc")
def test_a_daemon_whose_parent_has_gone_is_seen_until_it_ends():
    parent = subprocess.run([sys.executable, "-c", ORPHAN], check=True, capture_output=True, text=True)
    orphan = int(parent.stdout)
    assert running()[orphan].startswith("sleep 60")
    os.kill(orphan, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while orphan in running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphan not in running()

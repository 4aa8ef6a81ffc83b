"""Peak extra memory of a piece of Python, measured in a process of its own (Linux only)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MEASURABLE = Path("/proc/self/clear_refs").exists()

_MEASURE = """
import json, sys
def field(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
@PREPARE@
for _ in range(2):  # the libraries' own buffers exist after the first call
    run()
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = field("VmRSS")
run()
print(json.dumps(field("VmHWM") - before))
"""


def peak_extra(prepare: str, *arguments: object) -> int:
    """Bytes above what was resident before a call of ``run()``, at its highest.

    Args:
        prepare: Python that defines ``run``; it finds the arguments in ``sys.argv``.
        arguments: passed on as strings.
    """
    # freed blocks go back at once, so that what is resident is what is in use
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.replace("@PREPARE@", prepare), *map(str, arguments)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return int(json.loads(done.stdout))

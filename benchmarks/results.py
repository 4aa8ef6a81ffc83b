"""What every saved result begins with: date, commit, versions, machine."""

from __future__ import annotations

import datetime
import subprocess

from bpfree_kernels import doctor


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run_header() -> dict[str, object]:
    """Date, commit, versions and machine of this run: what every saved result begins with."""
    facts = doctor.report()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "versions": facts["versions"],
        "machine": facts["machine"],
        "processor": facts["extension"].get("processor"),
    }

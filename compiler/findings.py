"""What `edgec doctor` finds: one line each, of this machine (doctor.py) or of a device (device_findings.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: More than this share of the CPUs busy with other work shows in latencies: one call in four is disturbed.
BUSY = 0.25


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `fix` says what to do, None where there is nothing to do."""

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    fix: str | None = None

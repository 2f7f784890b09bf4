"""Every fault that is the user's, or the machine's, and not a bug of edgec.

Anything else that is raised is a bug: it keeps its traceback and the process ends with exit code 1.
A message says what is wrong, where, and how to fix it.
"""

from __future__ import annotations


class UserError(Exception):
    """The input is wrong (exit code 2). `str(error)` is the message a person reads."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ModelError(UserError):
    """The ONNX file cannot be read, is damaged, or holds what nobody can run."""


class DataError(UserError):
    """The image folder, a ranges file or a preprocessing file is wrong."""


class DeviceError(UserError):
    """The device is unknown, or cannot do what was asked of it."""


class OutputError(UserError):
    """The output path exists, cannot be written, or the disk is full."""


class BudgetError(UserError):
    """A stated budget (`--max-drop`, `--max-latency`, `--max-size`) cannot be met (exit code 3)."""

    exit_code = 3


class UnavailableError(UserError):
    """A target or toolchain asked for by name is not there (exit code 4)."""

    exit_code = 4

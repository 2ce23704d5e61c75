"""The command-line parser of the tools beside running a guest.

The rule here: a malformed command line is one line, as everywhere.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from tender.errors import UsageError


class Parser(ArgumentParser):
    """argparse, with our errors; an option is what it is called, not what it begins with."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

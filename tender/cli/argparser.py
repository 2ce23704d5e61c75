"""argparse for `ptender build` and `ptender inspect`, with errors of one line."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from tender.errors import UsageError


class Parser(ArgumentParser):
    """An ArgumentParser that raises UsageError, and takes no abbreviated options."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

"""argparse for the commands beside a run, with errors of one line."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from tender.errors import HostError, UsageError
from tender.host import write_all


class Parser(ArgumentParser):
    """An ArgumentParser that raises UsageError, and takes no abbreviated options."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def print_help(self, _file: object = None) -> None:
        try:
            write_all(1, self.format_help().encode())
        except OSError as error:
            raise HostError("standard output", "write", error.errno or 0) from None

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

"""`python -m tender`: the command `ptender`."""

import os
import sys

from tender.cli.main import main

os._exit(main(["ptender", *sys.argv[1:]]))

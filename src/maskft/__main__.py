"""``python -m maskft``: the ``maskft`` command, for which some commands need an extra."""

import sys

# The only arrow upwards: the command is the lab's.
from maskft_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

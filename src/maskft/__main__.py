"""``python -m maskft``: the ``maskft`` command, for which some commands need an extra."""

import sys

from maskft_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m maskft``: the ``maskft`` command, whose extra ``lab`` has to be installed."""

import sys

from maskft_lab.cli.main import main

sys.exit(main())

"""Run the command line as ``python -m lpechod``."""

import sys

from lpechod.cli import main

sys.exit(main())

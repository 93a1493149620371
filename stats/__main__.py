"""`python -m stats VERB`."""

import sys

from stats.cli import main

sys.exit(main(sys.argv[1:]))

"""`python -m stats.ttest`: the verb by itself."""

import sys

from stats.cli import main

sys.exit(main(["ttest", *sys.argv[1:]], program="python -m stats.ttest"))

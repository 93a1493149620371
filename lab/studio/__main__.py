"""Start the studio: `python -m lab.studio --help`."""

import sys

from lab.studio.server import main

sys.exit(main())

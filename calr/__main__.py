"""`python -m calr`."""

import sys

from calr.cli import main

sys.exit(main())

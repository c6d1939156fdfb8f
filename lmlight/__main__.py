"""`lmlight` and `python -m lmlight`."""

import sys

from lmlight.cli import main

if __name__ == "__main__":
    sys.exit(main())

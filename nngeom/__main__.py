"""``python -m nngeom``: the commands."""

import sys

from nngeom.page.command import main

if __name__ == "__main__":
    sys.exit(main())

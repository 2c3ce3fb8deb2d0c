"""`python -m aivillage` is `aivillage-node`."""

import sys

from aivillage.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

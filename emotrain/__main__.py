"""`python -m emotrain` is `emotrain`."""

import sys

from emotrain.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

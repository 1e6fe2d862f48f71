"""`python -m dsg` is the `dsg` command."""

import sys

from dsg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m pyro_vi` is the command `pyro-vi`."""

import sys

from pyro_vi.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m jaxlab TASK ...`: the same door as run.py and the script `jaxlab`."""

import sys

from jaxlab.tasks import main

if __name__ == "__main__":
    sys.exit(main())

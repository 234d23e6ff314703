"""python run.py TASK CONFIG.yaml [--field.sub value ...]; `python run.py --help` lists the tasks."""

import sys

from jaxlab.tasks import main

if __name__ == "__main__":
    sys.exit(main())

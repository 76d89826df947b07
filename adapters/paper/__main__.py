"""`python -m adapters.paper`: the driver of the whole comparison."""

import sys

from adapters.paper.driver import main

if __name__ == "__main__":
    sys.exit(main())

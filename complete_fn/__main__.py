"""`python -m complete_fn` is `complete-fn`."""

import sys

from complete_fn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

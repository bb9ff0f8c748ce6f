"""``python -m mbkern``: see :mod:`mbkern._cli`."""

import sys

from mbkern._cli import main

if __name__ == "__main__":
    sys.exit(main())

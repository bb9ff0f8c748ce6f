"""The two version numbers.

``__version__`` changes with every release. ``NUMERICS_VERSION`` changes only when some result bit
changes for some input: a new sequence of operations, summation order or special-value rule, and
with it the golden digests. Equal numbers mean equal bits, whatever the release, chip or device.
"""

__version__ = "0.1.0"
NUMERICS_VERSION = 8

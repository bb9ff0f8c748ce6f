"""Print the path of the nvcc that wheels have brought into this Python's environment.

nvcc looks for libcudart_static.a in lib64, as in a toolkit; the wheels have it in lib. So a link
is made between the two.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def main() -> int:
    """Make the link, print the path; the status is 1 where there is no such wheel."""
    try:
        listed = files("nvidia-cuda-nvcc") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.parts[-2:] == ("bin", "nvcc"):
            nvcc = Path(file.locate()).resolve()
            lib64 = nvcc.parents[1] / "lib64"
            if not lib64.exists():
                lib64.symlink_to("lib")
            print(nvcc)
            return 0
    print("no wheel of nvcc here: pip install -r cmake/nvcc-wheels.txt", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

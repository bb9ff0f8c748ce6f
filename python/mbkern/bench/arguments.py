"""What the words of a command line mean, read so that what is wrong is said with its value."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def count(text: str) -> int:
    """A number of 1 or more."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Such numbers, as in ``1,2``; each once."""
    return tuple(dict.fromkeys(count(part) for part in text.split(",")))


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0")
    return value


def names(text: str) -> tuple[str, ...]:
    """Names between commas; one at least, as from an empty variable of a shell would come all."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


def some_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Reads names, and says which there are where one is unknown."""

    def read(text: str) -> tuple[str, ...]:
        for name in (found := names(text)):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown name {name!r}; there are {', '.join(known)}"
                )
        return found

    return read


def check_output(path: Path | None, parser: argparse.ArgumentParser) -> None:
    """End the program with status 2 where a file cannot be written: before all, not after."""
    try:
        if path is not None:
            path.open("ab").close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")

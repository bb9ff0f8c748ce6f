"""Who is drawn in which colour."""

from __future__ import annotations

from collections.abc import Iterable

#: Readable on white and on black; the baseline is grey, limits are reddish and dashed.
_COLOURS = {
    "torch": "#858b94", "torch.compile": "#b98a00", "mbkern autograd": "#3c83de",
    "mbkern in place": "#149c77", "mbkern": "#3c83de",
}  # fmt: skip
_MORE = (
    "#c2609f", "#8d68d8", "#d4702a", "#5a9f2e", "#2b9db3", "#a0705a", "#5560c0", "#8f8a1f",
    "#e583a8", "#1a7f78", "#b99ae6", "#6f8f5f",
)  # fmt: skip
_LIMITS = ("#cf5a48", "#8f3226", "#e39a72", "#b0426b")


def colours(providers: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], str]:
    """The colour of each provider, which may be a limit: the same in all pictures of a report."""
    known = sorted(set(providers))
    others = [p for p in known if not p[1] and p[0] not in _COLOURS]
    limits = [p for p in known if p[1]]
    return {
        **{p: _COLOURS[p[0]] for p in known if not p[1] and p[0] in _COLOURS},
        **{p: _MORE[k % len(_MORE)] for k, p in enumerate(others)},
        **{p: _LIMITS[k % len(_LIMITS)] for k, p in enumerate(limits)},
    }

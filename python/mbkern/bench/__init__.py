"""Microbenchmarks: ``python -m mbkern bench``. See bench/README.md in the repository.

Needed are torch and mbkern; the extra ``mbkern[bench]`` adds drawn tables, progress and plots.
Public for suites of one's own (``--suite-file``): :class:`mbkern.bench.problem.Case`,
:class:`mbkern.bench.problem.Problem` and :class:`mbkern.bench.timing.Way`.
"""

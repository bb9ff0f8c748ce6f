"""The ways in which torch calls a loss: one row a setting, tried with every loss and dtype, most of
them in the slow run.

A setting runs a function (mbkern's, or torch's) on an input and a target and returns tensors that
must agree, or it names the refusal that must come. ``test_settings.py`` runs the rows;
``support_matrix.py`` makes docs/support.md of them.
"""

from settings import autograd, tensors, compilers, transforms, processes  # noqa: F401, I001
from settings.setting import SETTINGS, Setting, older_torch

__all__ = ["SETTINGS", "Setting", "older_torch"]

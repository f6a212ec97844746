"""Autograd passes the operators by: no gradient is recorded.

Else results would say that they require a gradient, which no one can compute.
"""

from __future__ import annotations

import torch

from . import communicator  # noqa: F401  defines the functional operators
from ._library import registrations

for _name in (
    "all_reduce",
    "_all_reduce_as",
    "_try_all_reduce",
    "_try_all_reduce_new",
    "functional_all_reduce",
    "functional_all_reduce_out",
):
    registrations.impl(_name, torch.library.fallthrough_kernel, "Autograd")

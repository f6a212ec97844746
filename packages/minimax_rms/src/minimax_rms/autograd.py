"""Autograd passes the operators by: no gradient is recorded.

Else results would say that they require a gradient, which no one can compute.
"""

from __future__ import annotations

import torch

from . import workspace  # noqa: F401  defines the functional operators
from ._library import registrations

for _name in (
    "minimax_allreduce_rms",
    "minimax_allreduce_rms_qk",
    "_minimax_allreduce_rms_qk_as",
    "functional_allreduce_rms",
    "functional_allreduce_rms_qk",
):
    registrations.impl(_name, torch.library.fallthrough_kernel, "Autograd")

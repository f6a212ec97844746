"""The type of the error of an operator that finds no memory.

A kernel package has this file as its own module ``_out_of_memory``, as it has ``_peer_group``.
Through torch's stable ABI an operator can raise no other type than ``RuntimeError``.
"""

from __future__ import annotations

import torch

# As allocate.h words it.
_WORDS = ": cannot allocate "


def raise_out_of_memory(error: RuntimeError) -> None:
    """Raise ``torch.OutOfMemoryError`` of the same text if that is what an operator's error says.

    For the handler of a call of an operator, which raises the error again where this returns.
    """
    text = str(error)
    if _WORDS in text and not isinstance(error, torch.OutOfMemoryError):
        raise torch.OutOfMemoryError(text) from None

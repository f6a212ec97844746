"""Loads the operator library, which defines ``torch.ops.minimax_rms``."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).with_name("_minimax_rms.so")


def load() -> None:
    """Load ``_minimax_rms.so`` from beside this file.

    Raises:
        ImportError: the library is missing (the sources were imported instead of an installed
            wheel) or this PyTorch cannot load it (older than 2.10).
    """
    if not LIBRARY_PATH.is_file():
        raise ImportError(
            f"minimax_rms: {LIBRARY_PATH} does not exist. Install the minimax-rms wheel; "
            "the source tree has no built library."
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"minimax_rms: torch {torch.__version__} cannot load {LIBRARY_PATH}: {error}"
        ) from error


load()

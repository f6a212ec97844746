"""Fixtures. The helper modules beside this file are importable whichever way pytest is started."""

from __future__ import annotations

import os
import secrets
import sys
import zlib
from pathlib import Path

import pytest
import torch
from rank_streams import why_not_at_once

sys.path.insert(0, str(Path(__file__).parent))

SEED_VARIABLE = "MINIMAX_RMS_TEST_SEED"
BASE_SEED = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(31))


def pytest_report_header() -> str:
    return f"minimax_rms: {SEED_VARIABLE}={BASE_SEED}, torch {torch.__version__}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, new in each session; printed, so that a failure shows it."""
    print(f"to repeat: {SEED_VARIABLE}={BASE_SEED}")
    return BASE_SEED ^ zlib.crc32(request.node.name.encode())


@pytest.fixture(scope="session")
def at_once() -> None:
    """Skips where the ranks of one process would wait for each other in vain."""
    if reason := why_not_at_once(16):
        pytest.skip(reason)

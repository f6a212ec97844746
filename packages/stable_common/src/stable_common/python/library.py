"""Loads a kernel package's operator library, and holds what its Python registers with torch.

A kernel package has this file as its own module ``_library``, which CMake installs beside the
library (``stable_common_add_extension(... PYTHON_MODULES library)``). Also of an editable install,
whose other modules are elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

# The last part but one: the package may be vendored in another.
_PACKAGE = __name__.split(".")[-2]

LIBRARY_PATH = Path(__file__).with_name(f"_{_PACKAGE}.so")


def load() -> None:
    """Load the operator library from beside this file: it defines ``torch.ops.<package>``.

    Raises:
        ImportError: the library is missing or this PyTorch cannot load it (older than 2.10).
    """
    if not LIBRARY_PATH.is_file():
        distribution = _PACKAGE.replace("_", "-")
        raise ImportError(
            f"{_PACKAGE}: {LIBRARY_PATH} does not exist. Install the {distribution} wheel."
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{_PACKAGE}: torch {torch.__version__} cannot load {LIBRARY_PATH}: {error}"
        ) from error


def _new_registrations() -> torch.library.Library:
    """Make the library of this import; that of an earlier import ends, with its registrations."""
    namespace = getattr(torch.ops, _PACKAGE)
    earlier = vars(namespace).get("_registrations")
    if earlier is not None:
        earlier._destroy()
    registrations = torch.library.Library(_PACKAGE, "FRAGMENT")  # type: ignore[no-untyped-call]
    # Beyond this module's life, which ends when it is removed from sys.modules.
    namespace._registrations = registrations
    return registrations


load()

#: The ``lib`` of every ``torch.library.define``, ``impl`` and ``register_fake`` of the package, so
#: that a package that was removed from ``sys.modules`` can be imported again.
registrations = _new_registrations()

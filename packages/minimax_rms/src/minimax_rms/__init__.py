"""RMSNorm of rows whose elements are split over the GPUs of one host, as MiniMax's QK norm needs.

Importing the package loads its operator library and registers the operators as
``torch.ops.minimax_rms.*``. Most callers want :class:`Workspace`; :mod:`minimax_rms.ops` has the
operators under it for those that have a workspace of their own.
"""

__version__ = "0.1.0"

from . import autograd, cpu, fake, ops, reference, workspace  # noqa: F401
from .workspace import Workspace

__all__ = ["Workspace", "__version__"]

"""All-reduce of tensors on the GPUs of one host, for tensor-parallel inference.

Importing the package loads its operator library and registers the operators as
``torch.ops.custom_ar.*``. Most callers want :class:`Communicator`; :mod:`custom_ar.ops` has the
operators under it for those that have a communicator of their own.
"""

__version__ = "0.1.0"

from . import autograd, communicator, fake, ops, reference  # noqa: F401
from .communicator import Communicator

__all__ = ["Communicator", "__version__"]

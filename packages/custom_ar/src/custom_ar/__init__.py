"""All-reduce of tensors on the GPUs of one host, for tensor-parallel inference.

Importing the package loads its operator library and registers the operators as
``torch.ops.custom_ar.*``. Most callers want :class:`Communicator`; :mod:`custom_ar.ops` has the
operators under it for those that have a communicator of their own.
"""

from importlib.metadata import version

from . import _library, communicator, fake, ops, reference  # noqa: F401
from .communicator import Communicator

__version__ = version("custom-ar")

__all__ = ["Communicator", "__version__"]

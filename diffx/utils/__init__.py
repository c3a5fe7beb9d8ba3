"""Ground: errors, files, broadcasting and keyed random numbers. Imports nothing else of diffx but the errors."""

from diffx.errors import DiffxError, nearest
from diffx.utils.broadcasting import expand_as
from diffx.utils.files import atomic_path, patiently, write_text
from diffx.utils.random import Keys

__all__ = ["DiffxError", "Keys", "atomic_path", "expand_as", "nearest", "patiently", "write_text"]

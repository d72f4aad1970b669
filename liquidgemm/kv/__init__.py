"""Keys and values in 8 or 4 bits, and decode attention over them."""

from .cache import KVCache

__all__ = ["KVCache"]

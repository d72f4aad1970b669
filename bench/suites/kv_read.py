"""A kernel that reads: the floor of `bench kv`."""

import triton
import triton.language as tl

TILE = 8192  # words of 4 bytes per program


@triton.jit
def read_kernel(words, out, count, SIZE: tl.constexpr = 8192):
    """Reads all words, and writes none unless their bits are of one pattern."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    largest = tl.max(tl.load(words + at, at < count, other=0), 0)
    if largest == 0x5EED5EED:
        tl.store(out, largest)

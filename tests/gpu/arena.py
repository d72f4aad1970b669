"""Memory around an output: a pool of the caching allocator with one block, known byte by byte."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from problems import DEVICE

GUARD = 4 << 20  # the caching allocator rounds to 2 MiB what it takes from the driver
SMALLEST = 2 << 20  # what is smaller could be served from blocks for small tensors
CANARY = 0xFF  # NaN as bfloat16, float16 and float32; -1 as an integer


class Memory:
    """A range of device memory, as torch.as_tensor takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class Arena:
    """Gives a tensor its place between guards; everything else in the block must stay as it was."""

    def __init__(self, size: int) -> None:
        self.pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.pool):
            block = torch.empty(size + 3 * GUARD, dtype=torch.uint8, device=DEVICE)
        self.address, self.size = block.data_ptr(), block.numel()
        del block  # back to the pool, which keeps it
        self.bytes = torch.as_tensor(Memory(self.address, self.size), device=DEVICE)
        assert self.bytes.data_ptr() == self.address, "a copy would guard nothing"

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Tensors made in here lie in the block, behind a guard, on memory full of canaries."""
        self.bytes.fill_(CANARY)
        with torch.cuda.use_mem_pool(self.pool):
            front = torch.empty(GUARD, dtype=torch.uint8, device=DEVICE)
            assert front.data_ptr() == self.address, "the allocator did not take our block"
            yield
        del front

    def check(self, *tensors: torch.Tensor, what: str) -> None:
        """Raises an AssertionError if a byte outside of these tensors has changed."""
        torch.cuda.synchronize()
        changed = self.bytes != CANARY
        for tensor in tensors:
            if not tensor.numel():  # has no place in memory
                continue
            begin = tensor.data_ptr() - self.address
            assert GUARD <= begin < self.size - tensor.nbytes - GUARD // 2, f"{what}: outside"
            changed[begin : begin + tensor.nbytes] = False
        if changed.any():
            at = int(changed.nonzero()[0])
            places = [(t.data_ptr() - self.address, t.nbytes) for t in tensors]
            raise AssertionError(
                f"{what}: {int(changed.sum())} bytes changed around the output, first at {at}; "
                f"outputs (begin, size): {places}"
            )

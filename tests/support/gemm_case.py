"""A product with its integer reference."""

import reference
import torch

from liquidgemm import gemm, pack_weight


class Case:
    """Random inputs of a gemm with their integer reference."""

    def __init__(self, m, n, k, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logical = reference.random_logical(n, k, seed)
        self.weight = pack_weight(*self.logical)
        self.weight_scale = torch.rand(n, generator=generator) * 1e-3
        self.x = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
        self.x_scale = torch.rand(m, generator=generator) * 1e-2
        self.bias = torch.randn(n, generator=generator)
        self.acc = reference.product(self.x, reference.decode(*self.logical))

    def gemm(self, bias=None, out_dtype=None, **changes):
        names = ("x", "x_scale", "weight", "weight_scale")
        return gemm(*(changes.get(n, getattr(self, n)) for n in names), bias, out_dtype)

"""Products with weights of one format on the CPU, and what every format's kernels are asked for."""

import reference
import torch

import liquidgemm
from liquidgemm import gemm, linear

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class FormatCase:
    """Inputs of a gemm with their integer reference; `extreme`: values at the ends alone.

    A format says in `draw_weight` what its packed weight is, and the integers ``[N, K]``, K padded,
    that it means.
    """

    def __init__(self, m, n, k, seed=0, extreme=False):
        self.generator, self.extreme = torch.Generator().manual_seed(seed), extreme
        self.weight, self.w8 = self.draw_weight(n, -(-k // 64))
        self.x = self.draw(-127, 127, m, k).to(torch.int8)
        self.weight_scale = torch.rand(n, generator=self.generator) * 1e-3
        self.x_scale = torch.rand(m, generator=self.generator) * 1e-2
        self.bias = torch.randn(n, generator=self.generator)
        self.acc = reference.product(self.x, self.w8)

    def draw_weight(self, n, groups):
        raise NotImplementedError

    def draw(self, low, high, *shape):
        values = torch.randint(low, high + 1, shape, generator=self.generator)
        return torch.where(values < (low + high) / 2, low, high) if self.extreme else values

    def draw_grid(self, n, columns, group, most_code, most_step):
        """Codes, steps and offsets that stay in INT8's range, and the integers that they mean."""
        codes = self.draw(0, most_code, n, columns)
        step = self.draw(1, most_step, n, columns // group)
        room = 255 - most_code * step
        drawn = torch.rand(n, columns // group, generator=self.generator)
        offset = (drawn * (room + 1)).long().clamp(max=room)
        w8 = codes * step.repeat_interleave(group, 1) + offset.repeat_interleave(group, 1) - 128
        return codes, step.to(torch.uint8), offset.to(torch.uint8), w8

    def gemm(self, bias=None, out_dtype=None):
        return gemm(self.x, self.x_scale, self.weight, self.weight_scale, bias, out_dtype)


def check_kernel(case, kernel, extreme):
    """One and few tokens, whole tiles of them, rows and k that fill no block."""
    liquidgemm.set_cpu_kernel(kernel)
    for m, n, k in ((1, 1, 1), (1, 200, 63), (4, 65, 700), (5, 16, 65), (33, 136, 1000)):
        c = case(m, n, k, m, extreme)
        reference.assert_same(c.gemm(out_dtype=torch.int32), c.acc.int(), m=m, n=n, k=k)
        for dtype in FLOATS:
            for bias in (None, c.bias):
                expected = reference.epilogue(c.acc, c.x_scale, c.weight_scale, bias, dtype)
                reference.assert_same(c.gemm(bias, dtype), expected, m=m, n=n, k=k, dtype=dtype)


def check_every_kernel(case, m, n, k, seed, extreme):
    """All sets on one example."""
    c = case(m, n, k, seed, extreme)
    for name in liquidgemm.cpu_kernels():
        liquidgemm.set_cpu_kernel(name)
        got = c.gemm(out_dtype=torch.int32)
        reference.assert_same(got, c.acc.int(), kernel=name, m=m, n=n, k=k, seed=seed)


def check_linear(case, kernel):
    """`linear` quantizes as ever."""
    liquidgemm.set_cpu_kernel(kernel)
    c = case(1, 80, 200)
    for dtype in FLOATS:
        x = torch.randn(3, 200).to(dtype)
        x8, scale = reference.quantize_activation(x)
        acc = reference.product(x8, c.w8)
        expected = reference.epilogue(acc, scale, c.weight_scale, c.bias, dtype)
        reference.assert_same(linear(x, c.weight, c.weight_scale, c.bias), expected, dtype=dtype)

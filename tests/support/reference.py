"""What the library must compute, written as plainly as possible and independently of it.

Integers are computed in int64 and floats with numpy's float32, whose operations are IEEE. The
formulas are those of arXiv 2509.01229 and of the docstrings of `liquidgemm.ops`.
"""

import math

import numpy as np
import torch


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its size, in which -0 and 0 differ."""
    if not t.is_floating_point():
        return t
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(actual: torch.Tensor, expected: torch.Tensor, **context) -> None:
    """Bit equality (NaNs are equal to each other); a failure names the place and both values."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype, context)
    assert actual.shape == expected.shape, (actual.shape, expected.shape, context)
    both_nan = (actual != actual) & (expected != expected)
    different = (bits(actual) != bits(expected)) & ~both_nan
    if different.any():
        places = different.nonzero()
        first = tuple(places[0].tolist())
        raise AssertionError(
            f"{len(places)} of {actual.numel()} differ, first at {first}: "
            f"got {actual[first].item()!r}, expected {expected[first].item()!r}; "
            f"shape {list(actual.shape)}, {context}"
        )


def random_logical(n: int, k: int, seed: int = 0):
    """Feasible (qweight, qscale, qoffset) that use every byte value a group can reach."""
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(k / 64)
    qweight = torch.randint(0, 256, (n, groups * 32), generator=generator)
    qscale = torch.randint(1, 18, (n, groups), generator=generator)
    room = 255 - 15 * qscale
    qoffset = (torch.rand(n, groups, generator=generator) * (room + 1)).long().clamp(max=room)
    return tuple(t.to(torch.uint8) for t in (qweight, qscale, qoffset))


def decode(qweight, qscale, qoffset) -> torch.Tensor:
    """int64 ``[N, K]``, element by element in Python integers: q * s + a - 128."""
    rows = []
    for bytes_, steps, offsets in zip(
        qweight.tolist(), qscale.tolist(), qoffset.tolist(), strict=True
    ):
        codes = [code for byte in bytes_ for code in (byte & 15, byte >> 4)]
        rows.append([q * steps[i // 64] + offsets[i // 64] - 128 for i, q in enumerate(codes)])
    return torch.tensor(rows, dtype=torch.int64)


def product(x8: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """The exact sums as int64 ``[..., N]``; w8 may have padding columns."""
    return x8.long() @ w8[:, : x8.shape[-1]].long().T


def epilogue(acc, x_scale, weight_scale, bias, dtype) -> torch.Tensor:
    """acc * x_scale * weight_scale + bias: float32, every operation rounded, one final cast."""
    y = acc.numpy().astype(np.float32)
    y = y * x_scale.numpy()[..., None]
    y = y * weight_scale.numpy()
    if bias is not None:
        y = y + bias.float().numpy()
    assert y.dtype == np.float32
    return torch.from_numpy(y).to(dtype)


@np.errstate(all="ignore")
def quantize_activation(x: torch.Tensor):
    values = x.float().numpy()
    amax = np.abs(values).max(-1)
    scale = np.where(np.isfinite(amax), amax / np.float32(127), np.float32(np.nan))
    q = np.clip(np.rint(values / scale[..., None]), -127, 127)
    q = np.where((scale > 0)[..., None], q, 0)
    return torch.from_numpy(q.astype(np.int8)), torch.from_numpy(scale.astype(np.float32))


def round_to_nearest(weight: torch.Tensor):
    """The paper's quantizer for a float32 ``[N, K]``, K a multiple of 64: w8 int64 and sigma."""
    w8s, sigmas = [], []
    for row in weight.numpy():
        sigma = np.abs(row).max() / np.float32(119)
        first = np.clip(np.rint(row / sigma), -119, 119) if sigma > 0 else np.zeros_like(row)
        decoded = []
        for group in first.reshape(-1, 64):
            lo = group.min()
            s = max(1, int(np.rint((group.max() - lo) / 15)))
            q = np.clip(np.rint((group - lo) / s), 0, 15)
            decoded.append(q * s + lo)
        w8s.append(np.concatenate(decoded).astype(np.int64))
        sigmas.append(sigma)
    return torch.from_numpy(np.stack(w8s)), torch.from_numpy(np.array(sigmas, np.float32))


def exact_int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `torch._int_mm` should give: on processors without VNNI its sums of 16 bits saturate."""
    return (a.double() @ b.double()).to(torch.int32)

"""Triton's kernels by its interpreter, on a CPU: the logic of what `tests/gpu/test_kv.py` runs."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from fresh_process import run_python
from packaging.version import Version

CODE = """
import torch
from kv_problems import dense_attention, paged_copy, poison_, rows, same_bits
from liquidgemm.kv import KVCache, _launch

for name in ("bfloat16", "float16"):
    lengths = torch.tensor([43, 18], dtype=torch.int32)
    k, v = (rows(2, 43, 2, 64, seed=seed) for seed in (1, 2))
    caches = [poison_(KVCache.allocate(name, 2, 2, 48, 64)) for _ in range(2)]
    caches[0].write_(k, v, lengths)
    _launch.write(k, v, *caches[1].tensors, lengths)
    assert same_bits(*caches), name
    cache = KVCache.allocate(name, 2, 2, 48, 64)
    cache.write_(k[:, :38], v[:, :38], lengths)
    paged, table = paged_copy(cache, 16, seed=3)
    config = _launch.Config(32, 32, 4, 2)
    for queries, options in ((1, {}), (2, dict(window=9, softcap=5.0)), (1, dict(starts=[3, 17]))):
        q = rows(2, queries, 6, 64, seed=4)
        expected = dense_attention(q, *cache.read(), lengths.tolist(), 0.1, **options)
        if "starts" in options:
            options["starts"] = torch.tensor(options["starts"], dtype=torch.int32)
        for one, pages in ((cache, None), (paged, table)):
            out = torch.full_like(q, float("nan"))
            arguments = (q, *one.tensors, lengths, 0.1, pages)
            _launch.attention(out, *arguments, config=config, interpreted=True, **options)
            error = (out - expected).abs().max() / expected.abs().max()
            assert error < 0.01, (name, queries, options, error)
"""


def test_kernels_by_the_interpreter() -> None:
    """Writing to the bit, attention to its rounding, of pages as well."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if Version(importlib.metadata.version("numpy")) >= Version("2.4"):
        pytest.skip("triton's interpreter needs numpy < 2.4")
    support = str(Path(__file__).parents[2] / "support")
    done = run_python(f"import sys; sys.path.append({support!r})\n{CODE}", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr

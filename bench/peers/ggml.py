"""llama.cpp's matrix product on the CPU, through the ggml libraries that a wheel on PyPI bundles.

``pip install --no-deps pywhispercpp`` brings them; which version and for which instructions they
were compiled is in `describe`. Weights lie in the buffer that llama.cpp itself would take: the
repacked one, if there is one for the type and this processor, else the plain one.
"""

from __future__ import annotations

import ctypes as c
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DISTRIBUTION = "pywhispercpp"
TYPES = {"q4_0": 2, "q4_K": 12}
BLOCKS = {"q4_0": 32, "q4_K": 256}  # what K is a multiple of, or ggml ends the process
F32 = 0
MEGABYTE = 1 << 20

P, I64, SIZE = c.c_void_p, c.c_int64, c.c_size_t
_SIGNATURES = {  # name: (library, result, arguments)
    "ggml_new_tensor_2d": ("base", P, (P, c.c_int, I64, I64)),
    "ggml_mul_mat": ("base", P, (P, P, P)),
    "ggml_new_graph": ("base", P, (P,)),
    "ggml_build_forward_expand": ("base", None, (P, P)),
    "ggml_quantize_chunk": ("base", SIZE, (c.c_int, P, P, I64, I64, I64, P)),
    "ggml_row_size": ("base", SIZE, (c.c_int, I64)),
    "ggml_get_data": ("base", P, (P,)),
    "ggml_free": ("base", None, (P,)),
    "ggml_version": ("base", c.c_char_p, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": ("base", P, (P, P)),
    "ggml_backend_buffer_free": ("base", None, (P,)),
    "ggml_backend_buft_name": ("base", c.c_char_p, (P,)),
    "ggml_backend_tensor_set": ("base", None, (P, P, SIZE, SIZE)),
    "ggml_backend_graph_compute": ("base", c.c_int, (P, P)),
    "ggml_backend_get_default_buffer_type": ("base", P, (P,)),
    "ggml_backend_reg_dev_get": ("base", P, (P, SIZE)),
    "ggml_backend_reg_get_proc_address": ("base", P, (P, c.c_char_p)),
    "ggml_backend_dev_supports_op": ("base", c.c_bool, (P, P)),
    "ggml_backend_cpu_init": ("cpu", P, ()),
    "ggml_backend_cpu_reg": ("cpu", P, ()),
    "ggml_backend_cpu_set_n_threads": ("cpu", None, (P, c.c_int)),
}
_FEATURES = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8", "neon", "dotprod")


class InitParams(c.Structure):
    _fields_ = (("size", SIZE), ("memory", P), ("no_alloc", c.c_bool))


def _library(part: str) -> Path | None:
    files = importlib.metadata.files(DISTRIBUTION) or []
    found = [file.locate() for file in files if f"libggml-{part}-" in file.name]
    return Path(found[0]) if found else None


class Ggml:
    """The libraries, or an ImportError that says what is missing."""

    def __init__(self) -> None:
        if importlib.util.find_spec(DISTRIBUTION) is None:
            raise ImportError(f"no ggml: pip install --no-deps {DISTRIBUTION}")
        self._libraries = {}
        for part in ("base", "cpu"):
            path = _library(part)
            if path is None:
                raise ImportError(f"{DISTRIBUTION} has no libggml-{part}")
            for dependency in path.parent.glob("libgomp*"):
                c.CDLL(str(dependency), mode=c.RTLD_GLOBAL)
            self._libraries[part] = c.CDLL(str(path), mode=c.RTLD_GLOBAL)
        for name, (part, result, arguments) in _SIGNATURES.items():
            function = getattr(self._libraries[part], name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._init = self._libraries["base"].ggml_init
        self._init.restype, self._init.argtypes = P, (InitParams,)
        self.backend = self.backend_cpu_init()
        self.device = self.backend_reg_dev_get(self.backend_cpu_reg(), 0)

    def describe(self) -> str:
        features = [
            name for name in _FEATURES if getattr(self._libraries["cpu"], f"ggml_cpu_has_{name}")()
        ]
        wheel = f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
        return f"ggml {self.version().decode()} of {wheel}, compiled for {', '.join(features)}"

    def set_threads(self, threads: int) -> None:
        self.backend_cpu_set_n_threads(self.backend, threads)

    def context(self, no_alloc: bool = True) -> int:
        return self._init(InitParams(MEGABYTE, None, no_alloc))

    def buffer_types(self) -> list[int]:
        """Those that repack weights, then the plain one."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), name)
        found = []
        if address:
            extra = c.CFUNCTYPE(c.POINTER(P), P)(address)(self.device)
            while extra and extra[len(found)]:
                found.append(extra[len(found)])
        return [*found, self.backend_get_default_buffer_type(self.backend)]

    def linear(self, type_name: str, weight: Tensor, m: int) -> tuple[Callable, str]:
        """``function(x) -> y`` for float32 x ``[m, k]`` and the name of the weight's buffer."""
        kind = TYPES[type_name]
        n, k = weight.shape
        weight = weight.float().contiguous()
        quantized = torch.empty(n * self.row_size(kind, k), dtype=torch.uint8)
        self.quantize_chunk(kind, weight.data_ptr(), quantized.data_ptr(), 0, n, k, None)
        for buffer_type in self.buffer_types():
            of_weight, of_rest = self.context(), self.context()
            w = self.new_tensor_2d(of_weight, kind, k, n)
            x = self.new_tensor_2d(of_rest, F32, k, m)
            if not self.backend_alloc_ctx_tensors_from_buft(of_weight, buffer_type):
                continue
            y = self.mul_mat(of_rest, w, x)
            graph = self.new_graph(of_rest)
            self.build_forward_expand(graph, y)
            if not self.backend_dev_supports_op(self.device, y):
                continue
            plain = self.backend_get_default_buffer_type(self.backend)
            self.backend_alloc_ctx_tensors_from_buft(of_rest, plain)
            self.backend_tensor_set(w, quantized.data_ptr(), 0, quantized.numel())
            x_memory = (c.c_float * (m * k)).from_address(self.get_data(x))
            y_memory = (c.c_float * (m * n)).from_address(self.get_data(y))
            x_view = torch.frombuffer(x_memory, dtype=torch.float32).view(m, k)
            y_view = torch.frombuffer(y_memory, dtype=torch.float32).view(m, n)

            def run(tokens: Tensor) -> Tensor:
                x_view.copy_(tokens)  # noqa: B023
                self.backend_graph_compute(self.backend, graph)  # noqa: B023
                return y_view  # noqa: B023

            return run, self.backend_buft_name(buffer_type).decode()
        raise RuntimeError(f"ggml has no product for {type_name}")

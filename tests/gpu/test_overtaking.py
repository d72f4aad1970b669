"""Programmatic launch: a producer that lets the next kernel start early must not be overtaken.

Under programmatic stream serialization our kernels start once every CTA of the kernel before them
has said so or has ended, and have to wait for the rest of it themselves. This producer says so at
once, then dawdles, then writes what our kernels read. What is read too early is the stale content.
"""

import pytest
import torch
from kv_problems import poison_, rows, same_bits
from problems import DEVICE, assert_equal, random_problem, testing

import liquidgemm
from liquidgemm.kv import KVCache
from liquidgemm.ops.plans import plan_names

SOURCE = r"""
extern "C" __global__ void slow_copy(char const* from, char* to, int bytes, int microseconds) {
  asm volatile("griddepcontrol.launch_dependents;");
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < 1000ull * microseconds);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes; i += gridDim.x * blockDim.x)
    to[i] = from[i];
}
"""
PLANS = list(enumerate(plan_names()))
MICROSECONDS = 1000


@pytest.fixture(scope="module")
def slow_copy():
    kernel = torch.cuda._compile_kernel(SOURCE, "slow_copy")

    def launch(source: torch.Tensor, target: torch.Tensor) -> None:
        # Few small CTAs: whatever starts early finds room beside them.
        assert source.nbytes == target.nbytes < 2**31
        kernel((8, 1, 1), (128, 1, 1), [source, target, source.nbytes, MICROSECONDS])

    return launch


@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
@pytest.mark.parametrize("late", ["x", "x_scale"])
def test_gemm_waits_for_its_activations(slow_copy, late, plan: int, name: str):
    """CHECKLIST 13: every plan, each operand that a kernel before it may have written."""
    problem = random_problem(12, 1024, 1088)
    expected = problem.output(torch.float32)
    operands = {"x": problem.x, "x_scale": problem.x_scale}
    fresh = operands[late]
    stale = operands[late] = torch.zeros_like(fresh)
    for i in range(5):
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        y = testing.gemm_with_plan(
            *operands.values(),
            problem.weight,
            problem.weight_scale,
            None,
            torch.float32,
            plan,
            0,
        )
        assert_equal(y, expected, f"{name} late {late} run {i}")


@pytest.mark.parametrize("m", [1, 40])
def test_gemm_does_not_write_early(slow_copy, m: int) -> None:
    """CHECKLIST 13: the kernel before may still read, or write, the memory that y has now."""
    problem = random_problem(m, 1024, 1088)
    expected = problem.output(torch.float32)
    shape = (m, 1024)
    pool = torch.cuda.MemPool()  # of one block, so that both get the same place in it
    for i in range(5):
        with torch.cuda.use_mem_pool(pool):
            old = torch.zeros(shape, device=DEVICE)
        garbage = torch.full(shape, float("nan"), device=DEVICE)
        torch.cuda.synchronize()
        address = old.data_ptr()
        slow_copy(garbage, old)  # in flight when its target is given to the next kernel
        del old
        with torch.cuda.use_mem_pool(pool):
            y = liquidgemm.gemm(
                problem.x,
                problem.x_scale,
                problem.weight,
                problem.weight_scale,
                None,
                torch.float32,
            )
        assert y.data_ptr() == address, "the allocator gave another block: nothing was tested"
        assert_equal(y, expected, f"{m=} run {i}")
        del y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 40, 600])
def test_quantization_waits_for_its_input(slow_copy, m: int, dtype: torch.dtype) -> None:
    """CHECKLIST 13: and `linear`, whose product must wait for more than the kernel before it."""
    problem = random_problem(m, 512, 1088)
    fresh = torch.randn(m, 1088, device=DEVICE).to(dtype)
    expected_x8, expected_scale = liquidgemm.quantize_activation(fresh)
    expected_y = liquidgemm.linear(fresh, problem.weight, problem.weight_scale)
    stale = torch.zeros_like(fresh)
    for i in range(5):
        for call in ("quantize_activation", "linear"):
            stale.zero_()
            torch.cuda.synchronize()
            slow_copy(fresh, stale)
            if call == "linear":
                y = liquidgemm.linear(stale, problem.weight, problem.weight_scale)
                assert_equal(y, expected_y, f"linear {m=} {dtype} run {i}")
            else:
                x8, scale = liquidgemm.quantize_activation(stale)
                assert_equal(x8, expected_x8, f"x8 {m=} {dtype} run {i}")
                assert_equal(scale, expected_scale, f"scale {m=} {dtype} run {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("m", "k"),  # one CTA per row; clusters, and rows beyond registers
    [(1, 1088), (40, 1088), (600, 1088), (1, 40000), (20, 40000)],
)
def test_producers_wait_for_their_inputs(slow_copy, m: int, k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 13: x, the residual, gates."""
    weight = torch.rand(k, device=DEVICE).to(dtype)
    fresh = torch.randn(m, 2 * k, device=DEVICE).to(dtype)
    halves = fresh.view(2 * m, k)[:m], fresh.view(2 * m, k)[m:]

    def norm(x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        tokens, h, _ = liquidgemm.rms_norm_quantize(x, weight, 1e-6, residual)
        return [tokens.x8, tokens.scale, h]

    def glu(gate_up: torch.Tensor) -> list[torch.Tensor]:
        return list(liquidgemm.glu_quantize(gate_up)[0][:2])

    stale = torch.zeros_like(fresh)
    late = stale.view(2 * m, k)[:m]
    for what, call, source, target in (
        ("x", lambda: norm(late, halves[1]), halves[0], late),
        ("residual", lambda: norm(halves[0], late), halves[1], late),
        ("gate_up", lambda: glu(stale), fresh, stale),
    ):
        target.copy_(source)
        expected = [part.clone() for part in call()]
        for i in range(5):
            target.zero_()
            torch.cuda.synchronize()
            slow_copy(source, target)
            for part, whole in zip(call(), expected, strict=True):
                assert_equal(part, whole, f"late {what} {m=} {k=} {dtype} run {i}")


def paged_kv(name: str) -> dict[str, torch.Tensor]:
    """A cache of three sequences, of which the first has several chunks, and a query for each."""
    heads, pages, tokens, head_dim = 2, 6, 1024, 128
    cache = KVCache.allocate(name, pages, heads, tokens, head_dim, DEVICE)
    lengths = torch.tensor([1500, 64, 33], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 1], [5, 2], [4, 0]], dtype=torch.int32, device=DEVICE)
    k, v = (rows(3, 1500, heads, head_dim, seed=seed, device=DEVICE) for seed in (1, 2))
    cache.write_(k, v, lengths, table)
    q = rows(3, 1, 4 * heads, head_dim, seed=3, device=DEVICE)
    stored = dict(zip(("k", "v", "k_params", "v_params"), cache.tensors, strict=True))
    return stored | {"lengths": lengths, "table": table, "q": q}


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("late", ["q", "k", "v", "k_params", "v_params", "lengths", "table"])
def test_kv_attention_waits_for_its_inputs(slow_copy, late: str, name: str) -> None:
    """CHECKLIST 13: and the second kernel, which adds up, for the first."""
    operands = paged_kv(name)

    def attention(q: torch.Tensor) -> torch.Tensor:
        stored = (operands[part] for part in ("k", "v", "k_params", "v_params"))
        return KVCache(*stored).attention(q, operands["lengths"], block_table=operands["table"])

    expected, other = attention(operands["q"]), operands["q"].flip(0)
    fresh = operands[late]
    stale = operands[late] = fresh.clone()
    for i in range(5):
        attention(other)  # leaves partial results of its own where those of the next call will be
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        assert_equal(attention(operands["q"]), expected, f"{name} late {late} run {i}")


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("late", ["new_k", "new_v", "lengths", "table"])
def test_kv_write_waits_for_its_inputs(slow_copy, late: str, name: str) -> None:
    """CHECKLIST 13"""
    operands = paged_kv(name)
    for seed, what in enumerate(("new_k", "new_v"), 4):
        operands[what] = rows(3, 5, 2, 128, seed=seed, device=DEVICE)

    def written(before) -> KVCache:
        cache = poison_(KVCache.allocate(name, 6, 2, 1024, 128, DEVICE))
        before()
        names = ("new_k", "new_v", "lengths", "table")
        cache.write_(*(operands[what] for what in names))
        return cache

    expected = written(torch.cuda.synchronize)
    fresh = operands[late]
    stale = operands[late] = fresh.clone()

    def before() -> None:
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)

    for i in range(5):
        assert same_bits(written(before), expected), f"{name} late {late} run {i}"


def test_the_producer_can_be_overtaken(slow_copy) -> None:
    """CHECKLIST 13: a kernel that does not wait reads stale data, so the tests above can fail."""
    hasty = torch.cuda._compile_kernel(
        'extern "C" __global__ void hasty(int const* from, int* to) { to[0] = from[0]; }', "hasty"
    )
    launch = launcher_with_programmatic_serialization()
    fresh = torch.ones(4, dtype=torch.int32, device=DEVICE)
    stale, seen = torch.zeros_like(fresh), torch.zeros_like(fresh)
    for _ in range(20):  # a busy machine may be late with the second launch
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        launch(hasty.func, stale, seen)
        torch.cuda.synchronize()
        assert stale[0].item() == 1
        if seen[0].item() == 0:
            return
    pytest.fail("no kernel got ahead of the one before it")


def launcher_with_programmatic_serialization():
    """cuLaunchKernelEx with the attribute that our own launches have."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    import ctypes

    def launch(function, *tensors: torch.Tensor) -> None:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX = config.gridDimY = config.gridDimZ = 1
        config.blockDimX = config.blockDimY = config.blockDimZ = 1
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        config.attrs = [attribute]
        config.numAttrs = 1
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        kinds = tuple(ctypes.c_void_p for _ in tensors)
        address = function.value if isinstance(function, ctypes.c_void_p) else int(function)
        (error,) = driver.cuLaunchKernelEx(config, driver.CUfunction(address), (pointers, kinds), 0)
        assert error == driver.CUresult.CUDA_SUCCESS, error

    return launch

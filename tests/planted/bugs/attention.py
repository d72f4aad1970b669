"""Of decode attention over the KV cache."""

from .bug import ATTENTION, KV, OVERTAKING, attention_bug, producer_bug

OF_ATTENTION = (
    # Decode attention over the KV cache.
    attention_bug(
        "values are read before they are copied",
        "decode_kernel.hpp",
        "loader_.wait_for_values(block);\n      multiply_values",
        "multiply_values",
        f"{KV} -k 'attention or invariance'",
    ),
    attention_bug(
        "bulk copies are not waited for",
        "bulk_loader.hpp",
        "Barrier::wait(barrier_of(block, of_values), block / Shape::kSlots % 2);",
        "",
        f"{KV} -k copied",
    ),
    attention_bug(
        "warps' sums are added before all of them are there",
        "decode_kernel.hpp",
        "    __syncthreads();\n    for (int at = threadIdx.x;",
        "    for (int at = threadIdx.x;",
        f"{KV} -k 'attention or invariance'",
        tool="racecheck",
    ),
    attention_bug(
        "attention does not wait for its queries and keys",
        "decode_kernel.hpp",
        "  wait_on_dependent_grids();\n  launch_dependent_grids();",
        "  launch_dependent_grids();",
        f"{OVERTAKING} -k kv_attention",
    ),
    producer_bug(
        "partial results are added before all of them are there",
        f"{ATTENTION}/combine.cu",
        "  wait_on_dependent_grids();\n",
        "",
        f"{OVERTAKING} -k kv_attention",
    ),
    producer_bug(
        "keys and values are written before they are there",
        f"{ATTENTION}/write.cu",
        "  wait_on_dependent_grids();\n",
        "",
        f"{OVERTAKING} -k kv_write",
    ),
    attention_bug(
        "all blocks are seen whole",
        "decode_kernel.hpp",
        "const bool whole = token >= most_first_",
        "const bool whole = token >= 0 || token >= most_first_",
        f"{KV} -k attention",
    ),
    attention_bug(
        "sums keep their unit when the reference is raised",
        "weights.hpp",
        "if (shift > 0 && reference.unit > kLeast)",
        "if (shift > 126)",
        f"{KV} -k all_sizes",
    ),
    attention_bug(
        "weights that leave 16 bits raise nothing",
        "weights.hpp",
        "|| max_of(weight) >= kTwo23 + 65536.f",
        "",
        f"{KV} -k all_sizes",
    ),
    attention_bug(
        "a NaN of a value is lost",
        "decode_kernel.hpp",
        "reference.total = fmaf(value_scale[j], 0.f, reference.total);",
        "",
        f"{KV} -k rows_of_nan",
    ),
    producer_bug(
        "values of four tokens are written where there are fewer",
        f"{ATTENTION}/write.cu",
        "all = false;",
        "",
        f"{KV} -k 'write_equals or nothing_else'",
    ),
)

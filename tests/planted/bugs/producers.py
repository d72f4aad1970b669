"""Of the kernels whose results a GEMM takes: norm, gated activation, quantizer."""

from .bug import (
    FUSED,
    GLU,
    INSTANTIATIONS,
    KERNEL,
    NORM,
    OVERTAKING,
    QUANTIZING,
    SMALL,
    Bug,
    Patch,
    bug,
    producer_bug,
)

OF_PRODUCERS = (
    # Norm and gated activation.
    producer_bug(
        "a norm does not wait for its x",
        NORM,
        "wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    producer_bug(
        "a gated activation does not wait for its gates",
        GLU,
        "wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    producer_bug(
        "a norm does not wait for the sums of other warps",
        NORM,
        "  __syncthreads();\n  const float factor",
        "  const float factor",
        FUSED,
        SMALL,
    ),
    producer_bug(
        "a norm sums the lanes in another order",
        NORM,
        "for (int half = 16; half > 0; half /= 2)",
        "for (int half = 1; half < 32; half *= 2)",
        FUSED,
    ),
    producer_bug(
        "a norm's sum depends on the number of threads",
        NORM,
        "sum_of_group[at / (kSumLanes * kSumVector)] = sum;",
        "sum_of_group[threadIdx.x / 32] = at < blockDim.x * kVector\n"
        "          ? sum : rounded::add(sum_of_group[threadIdx.x / 32], sum);",
        FUSED,
    ),
    producer_bug(
        "the quantizer sees h instead of y beyond the registers",
        NORM,
        "norm(vector, weight, factor, at);",
        "",
        FUSED,
    ),
    producer_bug(
        "up is read one row too early",
        GLU,
        "up.load(row + rows_.k,",
        "up.load(row,",
        FUSED,
    ),
    producer_bug(
        "a gated activation writes past the end of an odd row",
        GLU,
        "store(rows_.out + token_ * rows_.k + at, bytes, rows_.k - at, rows_.aligned);",
        "store(rows_.out + token_ * rows_.k + at, bytes, kVector, rows_.aligned);",
        FUSED,
        tool="memcheck",
    ),
    # GEMMs that quantize.
    Bug(
        "tokens are multiplied while others still quantize them",
        (
            Patch(
                f"{KERNEL}/load/tokens_quantized.hpp",
                "    }\n    panel_barrier<Tile>(0);\n  }\n",
                "    }\n  }\n",
            ),
            Patch(
                f"{KERNEL}/load/tokens_quantized.hpp",
                "      const Quantizer quantizer(scale);\n",
                "      __nanosleep(reader.row * 2000);\n      const Quantizer quantizer(scale);\n",
            ),
        ),
        (QUANTIZING,),
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    bug(
        "past the end of a row it begins anew",
        "load/tokens_quantized.hpp",
        "vector = {};",
        "vector.load(x, kVector, true);",
        QUANTIZING,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
)

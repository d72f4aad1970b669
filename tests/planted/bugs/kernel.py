"""Of the dense kernel: barriers, fences, the epilogue, the split of K, pairs of CTAs."""

from .bug import (
    BACK_TO_BACK,
    BUILD,
    CANARIES,
    EPILOGUE,
    EXACT,
    FORMATS,
    INSTANTIATIONS,
    KERNEL,
    OVERTAKING,
    Bug,
    Patch,
    bug,
)
from .changes import EVERY_LANE

OF_KERNEL = (
    # Barriers of the ring.
    bug(
        "consumer does not wait for a full stage",
        "consumer.hpp",
        "Barrier::wait(&shared_.barriers.full[ring.slot], ring.phase);",
        "",
        EXACT,
        BACK_TO_BACK,
    ),
    Bug(
        "loaders do not wait for an empty stage",
        tuple(
            Patch(
                f"{KERNEL}/load/{file}",
                "Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);",
                "",
            )
            for file in ("weights.hpp", "tokens_tma.hpp")
        ),
        (EXACT, BACK_TO_BACK),
    ),
    bug(
        "ring is one slot too long",
        "ring.hpp",
        "if (slot >= Tile::kStages)",
        "if (slot > Tile::kStages)",
        EXACT,
        BACK_TO_BACK,
    ),
    Bug(
        # In a ring as short as this, loads that overtake one another are enough.
        "depth of the ring is no multiple of the k groups",
        (
            Patch(
                f"{KERNEL}/tile.hpp",
                "kStages = kStagesThatFit / kKGroups * kKGroups",
                "kStages = kKGroups + 1",
            ),
            Patch(f"{KERNEL}/tile.hpp", "kStages >= 2 * kKGroups", "kStages > kKGroups"),
            Patch(f"{KERNEL}/protocol.hpp", "assert(stages_have_equal_readers()", "assert(true"),
        ),
        (EXACT, BACK_TO_BACK),
    ),
    # Weights that are dequantized before there are tokens.
    bug(
        "weights are dequantized before they are there",
        "ahead.hpp",
        "Barrier::wait(&shared_.barriers.ahead[stage], 0);",
        "",
        EXACT,
        BACK_TO_BACK,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    bug(
        "what was dequantized early does not wait for tokens",
        "ahead.hpp",
        "Barrier::wait(&shared_.barriers.full[slot], 0);",
        "",
        OVERTAKING,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    bug(
        "what was multiplied early is multiplied again",
        "consumer.hpp",
        "const int first = begin + ",
        "const int first = ",
        EXACT,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    bug(
        "stages that were multiplied early are not given back",
        "ahead.hpp",
        "consumer.release(slot, true, -1);",
        "",
        EXACT,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    # Fences.
    bug(
        "wgmma fence dropped",
        "consumer.hpp",
        "warpgroup_arrive();",
        "",
        BUILD,
        EXACT,
    ),
    bug(
        "tokens are loaded before the previous kernel is done",
        "load/tokens_tma.hpp",
        "wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    bug(
        "scales are read before the previous kernel is done",
        "kernel.hpp",
        "wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    bug(
        "a GEMM quantizes before the previous kernel is done",
        "kernel.hpp",
        "wait_on_dependent_grids();",
        "",
        OVERTAKING,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    Bug(
        "activations are quantized before the previous kernel is done",
        (
            Patch(
                "csrc/liquidgemm/producers/quantize_activation.cu",
                "wait_on_dependent_grids();",
                "",
            ),
        ),
        (OVERTAKING,),
        units=("liquidgemm/producers/quantize_activation.cu",),
    ),
    # The epilogue.
    bug(
        "a row past the last is stored",
        "store/elements.hpp",
        "out.stores(token + i % 2)",
        "token + i % 2 <= out.tokens",
        CANARIES,
        tool="memcheck",
    ),
    bug(
        "a channel past the last is stored",
        "store/elements.hpp",
        "i / 2 * 8 < channels",
        "i / 2 * 8 <= channels",
        CANARIES,
        EXACT,
    ),
    bug(
        "a word of two channels is stored in the row past the last",
        "store/columns.hpp",
        "out.stores(first + turn * 8 * Tile::kKGroups)",
        "first + turn * 8 * Tile::kKGroups <= out.tokens",
        CANARIES,
    ),
    bug(
        "words are stored past the last channel",
        "store/columns.hpp",
        "channel + 8 * i < out.sizes.n",
        "channel + 8 * i <= out.sizes.n",
        CANARIES,
        EXACT,
    ),
    bug(
        "a whole vector is stored in the row past the last",
        "store/rows.hpp",
        "first_token + row < rows_",
        "first_token + row <= rows_",
        CANARIES,
        units=(f"{INSTANTIATIONS}/t256_p2_k1_s2.cu",),
    ),
    bug(
        "TMA stores rows of the next tile",
        "store/rows.hpp",
        "out.first_token + out.tokens == out.sizes.m;",
        "true;",
        EPILOGUE,
        EXACT,
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    bug(
        "neighbouring channels are exchanged",
        "store/output_tile.hpp",
        "/ 32 * 16 + threadIdx.x % 32 / 4;",
        "/ 32 * 16 + (threadIdx.x % 32 / 4 ^ 1);",
        EXACT,
    ),
    Bug(
        "no barrier between staging and adding the sums",
        (
            Patch(
                f"{KERNEL}/reduce/cluster.hpp",
                "    panel_barrier<Tile>(panel_);  // the parts, and the scales",
                "",
            ),
            *EVERY_LANE.patches,
        ),
        (EXACT, BACK_TO_BACK),
        tool="racecheck",
    ),
    Bug(
        "sums are sent while a slow peer still adds up those before",
        (
            Patch(f"{KERNEL}/reduce/cluster.hpp", "Barrier::wait(drained, phase(item) ^ 1);", ""),
            Patch(
                f"{KERNEL}/reduce/cluster.hpp",
                "Barrier::wait(received, phase(item));",
                "Barrier::wait(received, phase(item));\n      __nanosleep(rank * 2000);",
            ),
        ),
        (EXACT, BACK_TO_BACK),
    ),
    # The split of K.
    bug(
        "a stage is counted twice where K is split",
        "schedule/dense.hpp",
        "work.end = stages * (part + 1) >> log2_split;",
        "work.end = (stages * (part + 1) >> log2_split) + (part + 1 < 1 << log2_split);",
        EXACT,
    ),
    # Pairs.
    Bug(
        "a CTA of a pair sends its sums into a ring that is still read",
        (
            Patch(
                f"{KERNEL}/reduce/pair.hpp", "Barrier::wait(&shared.barriers.multiplied, 0);", ""
            ),
            Patch(
                f"{KERNEL}/consumer.hpp",
                "if (!kAlternates && block == 0)\n",
                "__nanosleep((pair_rank >= 0) * cta_rank() * 2000);\n"
                "          if (!kAlternates && block == 0)\n",
            ),
        ),
        (EXACT, BACK_TO_BACK),
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    bug(
        "the other CTA of a pair does not hear that a stage is free",
        "consumer.hpp",
        "arrives && pair_rank >= 0",
        "false",
        EXACT,
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    bug(
        "the CTAs of a pair release each other's rings for a tile that they share",
        "kernel.hpp",
        "cta_rank() ^ !work.split",
        "cta_rank() ^ 1",
        EXACT,
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    Bug(
        "a CTA of a pair leaves before the other has arrived at its barriers",
        (
            Patch(f"{KERNEL}/load/tokens_tma.hpp", "pairs && slot < Tile::kStages", "false"),
            Patch(
                f"{KERNEL}/consumer.hpp",
                "    __syncwarp();\n    const bool arrives",
                "    if (pair_rank == 0)\n      __nanosleep(20000);\n"
                "    __syncwarp();\n    const bool arrives",
            ),
        ),
        (EXACT,),
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    bug(
        "both CTAs of a pair load the same half of the tokens",
        "load/tokens_tma.hpp",
        "half * cta_rank()",
        "0",
        EXACT,
        units=(f"{INSTANTIATIONS}/t128_p2_k1_s2.cu",),
    ),
    Bug(
        "second k step of INT8 weights is read where the first lies",
        (
            Patch(
                "csrc/liquidgemm/formats/int8.hpp",
                '"r"(f.address + kStepBytes * step)',
                '"r"(f.address)',
            ),
        ),
        (f"{FORMATS} -k every_weight", f"{FORMATS} -k every_plan"),
        units=("instantiations/int8/t32_p1_k3_s2.cu",),
    ),
    Bug(
        "lowest bits of the fourth of 6-bit codes are those of the third word's neighbours",
        (
            Patch(
                "csrc/liquidgemm/formats/liquidquant6.hpp",
                "((w2 >> 6) & 0x03030303u)",
                "((w2 >> 4) & 0x03030303u)",
            ),
        ),
        (f"{FORMATS} -k every_weight", f"{FORMATS} -k every_plan"),
        units=("instantiations/liquidquant6/t256_p2_k1_s2.cu",),
    ),
    Bug(
        "second group of 32 has the step and offset of the first",
        (
            Patch(
                "csrc/liquidgemm/formats/liquidquant_g32.hpp",
                '"r"(params_ + offset), "n"(kParamBytes)',
                '"r"(params_ + offset), "n"(0)',
            ),
        ),
        (f"{FORMATS} -k every_weight", f"{FORMATS} -k every_plan"),
        units=("instantiations/liquidquant_g32/t32_p1_k3_s2.cu",),
    ),
)

"""Bugs planted in copies of the sources, each with the tests that have to catch it.

A bug is a list of textual patches, so that csrc/ stays free of switches. Anchors are short, and
every occurrence is replaced: a change of the kernel should rarely touch them, and where it does,
tests/cpu/project/test_planted.py says which anchor is gone.

`caught_by` holds arguments of pytest: one of these selections has to fail, or to hang until the
watchdog ends it. BUILD means that the check of ptxas' report refuses the library.
"""

from dataclasses import dataclass

KERNEL = "csrc/liquidgemm/kernel"
INSTANTIATIONS = "instantiations/liquidquant"  # below csrc
BUILD = "the build"
ALL_TILES = ()

EXACT = "tests/gpu/test_gemm.py -k every_configuration"
EPILOGUE = "tests/gpu/test_gemm.py -k epilogue"
BACK_TO_BACK = "tests/gpu/test_gemm.py -k back_to_back"
OVERTAKING = "tests/gpu/test_overtaking.py"
CANARIES = "tests/gpu/test_canaries.py"
SMALL = "tests/gpu/test_small_suite.py"
QUANTIZING = "tests/gpu/test_quantizing_gemm.py"
GROUPED = "tests/gpu/test_grouped_gemm.py"
MOE = "tests/gpu/test_moe_chain.py"
PRODUCERS = "liquidgemm/producers"  # below csrc
OF_GROUPED = ("instantiations/grouped/t16_p1_k4_s4.cu",)
FUSED = "tests/gpu/test_fused_producers.py"
ATTENTION = "liquidgemm/attention"  # below csrc
KV = "tests/gpu/test_kv.py"
NORM, GLU = (f"{PRODUCERS}/{name}.cu" for name in ("rms_norm", "glu"))


@dataclass(frozen=True)
class Patch:
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    name: str
    patches: tuple[Patch, ...]
    caught_by: tuple[str, ...]
    tool: str = ""  # of compute-sanitizer, which has to report it too
    units: tuple[str, ...] = (f"{INSTANTIATIONS}/t32_p1_k3_s2.cu",)  # what is compiled with the bug

    def apply(self, text: str, file: str) -> str:
        """The file's text with the patches that are meant for it.

        Raises:
            LookupError: an anchor is gone.
        """
        for patch in self.patches:
            if patch.file != file:
                continue
            if patch.old not in text:
                raise LookupError(f"{self.name}: {file} no longer holds {patch.old!r}")
            text = text.replace(patch.old, patch.new)
        return text

    @property
    def files(self) -> set[str]:
        return {patch.file for patch in self.patches}


def bug(name: str, file: str, old: str, new: str, *caught_by: str, **more) -> Bug:
    return Bug(name, (Patch(f"{KERNEL}/{file}", old, new),), caught_by, **more)


def producer_bug(name: str, unit: str, old: str, new: str, *caught_by: str, **more) -> Bug:
    return Bug(name, (Patch(f"csrc/{unit}", old, new),), caught_by, units=(unit,), **more)


def attention_bug(name: str, file: str, old: str, new: str, *caught_by: str) -> Bug:
    """Of decode attention over int8."""
    units = (f"{ATTENTION}/decode_int8.cu",)
    return Bug(name, (Patch(f"csrc/{ATTENTION}/{file}", old, new),), caught_by, units=units)


# No bug: what `make sanitize` gives to racecheck, see csrc/liquidgemm/kernel/protocol.hpp.
EVERY_LANE = Bug(
    "every lane arrives",
    (
        Patch(
            f"{KERNEL}/protocol.hpp",
            "#ifdef LIQUIDGEMM_EVERY_LANE_ARRIVES",
            "#if 1",
        ),
    ),
    (),
    units=ALL_TILES,
)

BUGS = (
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
        "cutlass::arch::wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    bug(
        "scales are read before the previous kernel is done",
        "kernel.hpp",
        "cutlass::arch::wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    bug(
        "a GEMM quantizes before the previous kernel is done",
        "kernel.hpp",
        "cutlass::arch::wait_on_dependent_grids();",
        "",
        OVERTAKING,
        units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",),
    ),
    Bug(
        "activations are quantized before the previous kernel is done",
        (
            Patch(
                "csrc/liquidgemm/producers/quantize_activation.cu",
                "cutlass::arch::wait_on_dependent_grids();",
                "",
            ),
        ),
        (OVERTAKING,),
        units=("liquidgemm/producers/quantize_activation.cu",),
    ),
    # Norm and gated activation.
    producer_bug(
        "a norm does not wait for its x",
        NORM,
        "cutlass::arch::wait_on_dependent_grids();",
        "",
        OVERTAKING,
    ),
    producer_bug(
        "a gated activation does not wait for its gates",
        GLU,
        "cutlass::arch::wait_on_dependent_grids();",
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
    # The epilogue.
    bug(
        "a row past the last is stored",
        "store/elements.hpp",
        "token + i % 2 < out.tokens",
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
        "first + turn * 8 * Tile::kKGroups < out.tokens",
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
    # Tiles that the device resolves, and the layer of experts around them.
    bug(
        "a resolved tile is replaced while roles still need it",
        "schedule/grouped.hpp",
        "Barrier::wait(&shared().taken[slot], item / kEntries % 2 ^ 1);",
        "",
        f"{GROUPED} -k every_plan",
        units=OF_GROUPED,
    ),
    bug(
        "roles do not wait until a tile is resolved",
        "schedule/grouped.hpp",
        "Barrier::wait(&shared().resolved[item % kEntries], item / kEntries % 2);",
        "",
        f"{GROUPED} -k every_plan",
        units=OF_GROUPED,
    ),
    bug(
        "the last tile of an expert goes on into the next one's rows",
        "schedule/grouped.hpp",
        "min(params.tile_tokens, rows.end - first)",
        "min(params.tile_tokens, 1 << 30)",
        f"{GROUPED} -k every_plan",
        units=OF_GROUPED,
    ),
    bug(
        "every expert has the scales of the first",
        "schedule/grouped.hpp",
        "place.scale_offset = entry.expert * sizes_.n;",
        "place.scale_offset = 0;",
        f"{GROUPED} -k epilogue",
        units=OF_GROUPED,
    ),
    bug(
        "tiles of the second band are those of the first",
        "schedule/grouped.hpp",
        "first_of_band + in_band - n_tile * height",
        "in_band - n_tile * height",
        f"{GROUPED} -k every_plan",
        units=OF_GROUPED,
    ),
    bug(
        "offsets are read before the kernel that writes them has finished",
        "schedule/grouped.hpp",
        "if (!params.offsets_are_visible)",
        "if (params.experts < 0)",
        f"{GROUPED} -k waits",
        units=OF_GROUPED,
    ),
    bug(
        "offsets are believed",
        "schedule/grouped.hpp",
        "min(max(__ldcg(&params.offsets[expert]), 0), sizes.m)",
        "__ldcg(&params.offsets[expert])",
        f"{GROUPED} -k garbage",
        units=OF_GROUPED,
    ),
    Bug(
        "gate and up are not rounded before the activation",
        (
            Patch(
                f"{KERNEL}/store/gated.hpp",
                "const float2 gates = to_floats(words[0], Pair{}), "
                "ups = to_floats(words[1], Pair{});",
                "const float2 token_scale = this->out_.token_scales(octet);\n"
                "    const float2 ups = to_floats(words[1], Pair{});\n"
                "    const float2 gates = {\n"
                "        scaled(sum.x, token_scale.x, channels.scale[0], channels.bias[0]),\n"
                "        scaled(sum.y, token_scale.y, channels.scale[0], channels.bias[0])};",
            ),
        ),
        (f"{MOE} -k activation_in_the_product",),
        units=OF_GROUPED,
    ),
    Bug(
        "the schedule does not wait for the router",
        (
            Patch(
                f"csrc/{PRODUCERS}/moe_schedule.cu",
                "cutlass::arch::wait_on_dependent_grids();",
                "",
            ),
        ),
        (f"{MOE} -k waits",),
        units=(f"{PRODUCERS}/moe_schedule.cu",),
    ),
    Bug(
        "the first product starts before the schedule is complete",
        (
            Patch(
                f"csrc/{PRODUCERS}/quantize_rows.cu",
                "if constexpr (kOrder == RowOrder::kInPlace)",
                "if constexpr (true)",
            ),
        ),
        (f"{MOE} -k waits",),
        units=(f"{PRODUCERS}/quantize_rows.cu",),
    ),
    Bug(
        "rows are combined before the product has finished",
        (
            Patch(
                f"csrc/{PRODUCERS}/moe_combine.cu",
                "cutlass::arch::wait_on_dependent_grids();",
                "",
            ),
        ),
        (f"{MOE} -k back_to_back", f"{MOE} -k equals_its_parts"),
        units=(f"{PRODUCERS}/moe_combine.cu",),
    ),
    # Decode attention over the KV cache.
    attention_bug(
        "values are read before they are copied",
        "decode_kernel.hpp",
        "loader_.wait();\n      multiply_values",
        "multiply_values",
        f"{KV} -k 'attention or invariance'",
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

# No bug: random pauses of up to some microseconds wherever one role waits for another, so that they
# meet in other orders than usual. The exactness suite has to pass.
_DELAY = """
CUTE_DEVICE void random_delay() {
  uint32_t clock;
  asm volatile("mov.u32 %0, %clock;" : "=r"(clock));
  const uint32_t warp = blockIdx.x * 32 + threadIdx.x / 32;
  const uint32_t hash = ((clock >> 2) ^ warp * 0x9e3779b9u) * 0x85ebca6bu;
  __nanosleep(hash >> 29 == 0 ? hash >> 17 & 0xfff : 0);  // one time in eight, up to 4 us
}

inline constexpr int kWarpsPerGroup = 4;"""

DELAY = Bug(
    "random delays",
    (
        Patch(
            f"{KERNEL}/protocol.hpp",
            "\ninline constexpr int kWarpsPerGroup = 4;",
            _DELAY,
        ),
        Patch(
            f"{KERNEL}/consumer.hpp",
            "Barrier::wait(&shared_.barriers.full[ring.slot], ring.phase);",
            "random_delay();\n"
            "    Barrier::wait(&shared_.barriers.full[ring.slot], ring.phase);\n"
            "    random_delay();",
        ),
        Patch(
            f"{KERNEL}/ahead.hpp",
            "Barrier::wait(&shared_.barriers.full[slot], 0);",
            "random_delay();\n"
            "      Barrier::wait(&shared_.barriers.full[slot], 0);\n"
            "      random_delay();",
        ),
        Patch(
            f"{KERNEL}/consumer.hpp",
            "    __syncwarp();\n    const bool arrives",
            "    random_delay();\n    __syncwarp();\n    const bool arrives",
        ),
        *(
            Patch(
                f"{KERNEL}/load/{file}",
                "Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);",
                "random_delay();\n"
                "        Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);\n"
                "        random_delay();",
            )
            for file in ("weights.hpp", "tokens_tma.hpp")
        ),
        Patch(
            f"{KERNEL}/protocol.hpp",
            "  cutlass::arch::NamedBarrier::arrive_and_wait(",
            "  random_delay();\n  cutlass::arch::NamedBarrier::arrive_and_wait(",
        ),
        Patch(
            f"{KERNEL}/reduce/cluster.hpp",
            "Barrier::wait(drained, phase(item) ^ 1);",
            "random_delay();\n      Barrier::wait(drained, phase(item) ^ 1);",
        ),
        Patch(
            f"{KERNEL}/reduce/cluster.hpp",
            "Barrier::wait(received, phase(item));",
            "Barrier::wait(received, phase(item));\n      random_delay();",
        ),
        *(
            Patch(
                f"{KERNEL}/{file}",
                "arrive_at_cluster_if(",
                "random_delay();\n    arrive_at_cluster_if(",
            )
            for file in ("reduce/cluster.hpp", "reduce/pair.hpp")
        ),
    ),
    (),
    units=ALL_TILES,
)

"""Of the layer of experts: tiles that the device resolves, and the kernels around them."""

from .bug import GROUPED, KERNEL, MOE, OF_GROUPED, PRODUCERS, Bug, Patch, bug

OF_EXPERTS = (
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
                "wait_on_dependent_grids();",
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
                "wait_on_dependent_grids();",
                "",
            ),
        ),
        (f"{MOE} -k back_to_back", f"{MOE} -k equals_its_parts"),
        units=(f"{PRODUCERS}/moe_combine.cu",),
    ),
)

"""Of the layer of experts: tiles that the device resolves, and the kernels around them."""

from .bug import (
    BY_SLOTS,
    GATES,
    GROUPED,
    MOE,
    OF_GROUPED,
    OF_SLOTS,
    PRODUCERS,
    Bug,
    Patch,
    bug,
)

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
    bug(
        "up is activated instead of the gate",
        "store/gated.hpp",
        "gates[i] = words[0], ups[i] = words[1];",
        "gates[i] = words[1], ups[i] = words[0];",
        f"{MOE} -k activation_in_the_product",
        units=OF_GROUPED,
    ),
    bug(
        "the exponent of silu is off by seven units in the last place",
        "store/gated_pair.hpp",
        "kSilu = -0x1.715472p0f",
        "kSilu = -0x1.715480p0f",
        GATES,
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
        "the schedule forgets the slots of the CTAs before",
        (
            Patch(
                f"csrc/{PRODUCERS}/moe_schedule.cu",
                "int row = first_row + of_expert.before;",
                "int row = first_row;",
            ),
        ),
        (f"{MOE} -k schedule",),
        units=(f"{PRODUCERS}/moe_schedule.cu",),
    ),
    Bug(
        "the schedule reads totals that others have not written yet",
        (
            Patch(
                f"csrc/{PRODUCERS}/moe_schedule.cu",
                "cute::cluster_arrive();\n    cute::cluster_wait();",
                "",
            ),
        ),
        (f"{MOE} -k schedule",),
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
                "wait_on_dependent_grids();\n  T const* const y",
                "T const* const y",
            ),
        ),
        (f"{MOE} -k back_to_back", f"{MOE} -k equals_its_parts"),
        units=(f"{PRODUCERS}/moe_combine.cu",),
    ),
    # Products by slots.
    bug(
        "rows of other slots are stored, too",
        "schedule/slots.hpp",
        "place.skipped = row;",
        "place.skipped = 0;",
        f"{BY_SLOTS} -k every_plan",
        units=OF_SLOTS,
    ),
    bug(
        "a slot has the weights of the first expert",
        "schedule/slots.hpp",
        "place.packed_panel = max(expert_, 0) * sizes_.panels + n_tile;",
        "place.packed_panel = n_tile;",
        f"{BY_SLOTS} -k every_plan",
        units=OF_SLOTS,
    ),
    bug(
        "ids are read before the router has finished",
        "schedule/slots.hpp",
        "if (!params.ids_are_visible)",
        "if (params.gated && params.ids_are_visible)",
        f"{BY_SLOTS} -k waits",
        units=OF_SLOTS,
    ),
)

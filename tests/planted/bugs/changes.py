"""Changes that are no bugs, for the suites that have to pass with them."""

from .bug import ALL_TILES, KERNEL, Bug, Patch

# What `make sanitize` gives to racecheck, see csrc/liquidgemm/kernel/protocol.hpp.
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

# Random pauses of up to some microseconds wherever one role waits for another, so that they
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

// Barriers of every compiled kernel: the counts of protocol.hpp against a walk over the CTA's
// warps. Its own assertions are checked at compile time, for each of them.
#include <cstdio>
#include <utility>

#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/storage.hpp"
#include "liquidgemm/kernel/tile.hpp"
#include "liquidgemm/plan/grouped.hpp"
#include "liquidgemm/plan/tiles.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, TileShape const& tile, char const* what) {
  if (!condition && ++failures <= 10)
    std::printf("FAILED: %s: %s\n", name(tile).c_str(), what);
}

template <class Tile>
void test_tile() {
  using Arrivals = liquidgemm::Arrivals<Tile>;
  static_assert(sizeof(SharedStorage<Tile>) <= Tile::kSharedBytes);
  for (int stage = 0; stage < 3 * Tile::kStages; ++stage) {
    int readers = 0, consumers = 0, of_panel = 0;
    for (int warp = 0; warp < Tile::kConsumerThreads / 32; ++warp) {
      const int group = warp / 4;
      readers += group % Tile::kKGroups == stage % Tile::kKGroups;
      of_panel += group / Tile::kKGroups == 0;
      ++consumers;
    }
    expect(readers * kReleasesPerWarp == Arrivals::empty(false), Tile::kShape, "empty");
    expect(2 * readers * kReleasesPerWarp == Arrivals::empty(true), Tile::kShape, "empty, pairs");
    expect(consumers == Arrivals::kMultiplied, Tile::kShape, "multiplied");
    for (int split : kSplits)
      expect(of_panel * split == Arrivals::drained(split), Tile::kShape, "drained");
    // The slot's next stage is the same group's.
    expect(stage % Tile::kKGroups == (stage + Tile::kStages) % Tile::kKGroups, Tile::kShape,
           "slot");
  }
  expect(Arrivals::kFull == (Tile::kQuantizes ? 1 : 2), Tile::kShape, "full");
  // Where a warp resolves tiles: two loaders, and every warp that multiplies.
  expect(Tile::kQuantizes || 2 + Tile::kConsumerThreads / 32 * kReleasesPerWarp == Arrivals::kTaken,
         Tile::kShape, "taken");
}

template <TileShape tile, class Format>
void test_if_compiled() {
  if constexpr (supports<Format>(tile, Element::kInt8))
    test_tile<Tile<tile, Format>>();
}

template <int... I, class... Format>
void test_tiles(std::integer_sequence<int, I...>, std::tuple<Format...>) {
  const auto test_all = [&]<class F>(F*) { (test_if_compiled<kTileShapes[I], F>(), ...); };
  (test_all(static_cast<Format*>(nullptr)), ...);
}

template <int... I>
void test_grouped_tiles(std::integer_sequence<int, I...>) {
  (test_tile<Tile<kGroupedTileShapes[I], LiquidQuant>>(), ...);
}

}  // namespace

int main() {
  test_tiles(std::make_integer_sequence<int, kNumTileShapes>{}, Formats{});
  test_grouped_tiles(std::make_integer_sequence<int, kNumGroupedTileShapes>{});
  struct TwoBytes {};  // in place of the device's 16-bit types
  for (TileShape const& tile : kTileShapes)
    expect(tile.can_quantize() == supports<LiquidQuant>(tile, Element::kFloat16), tile,
           "quantizes");
  test_tile<Tile<TileShape{8, 1, 2, 4, 2, 1}, LiquidQuant, TwoBytes>>();
  test_tile<Tile<TileShape{8, 1, 4, 4, 1, 2}, LiquidQuant, TwoBytes>>();
  std::printf("%s\n", failures ? "protocol: FAILED" : "protocol: ok");
  return failures != 0;
}

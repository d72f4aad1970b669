// What a CTA computes at a time. Every role walks the same items in the same order.
//
// Work is what the host says of it, such as DenseWork: tile_tokens, the height of the boxes of
// tokens, cluster, reads_weights_once(), kScheduleBytes, Epilogue<Tile>, what becomes of the sums,
// and Scheduler<Tile>, the source of items, with these members:
//
//   valid()       whether there is an item
//   work()        the item
//   place(item)   where its tile lies
//   advance()     to the next item
//   is_last()     whether no item follows
//   item()        items done: the one counter that a role carries from item to item
//
// If items are not known before the launch, a warp finds them out, and leaves them in
// kScheduleBytes of shared memory behind SharedStorage: init() and resolve(), see
// schedule/grouped.hpp.
//
// No role computes from the number of a tile where anything lies: a second scheduler changes none.
#pragma once

namespace liquidgemm {

// A tile of y, or a part of its sums along K.
struct WorkItem {
  int m_tile, n_tile;  // for place() alone
  int begin, end;      // along K, in pipeline stages
  int stages_done;     // by this CTA before this item: its position in the ring
  bool split;          // whether a pair shares the tile along K
};

// Where a tile lies.
struct Place {
  int first_token, tokens;  // rows of x and of y
  int skipped = 0;          // of those, the first ones, which are not stored
  int first_panel;          // of y, 64 channels each
  int panels;               // that the weight has from there on, at most Tile::kPanels
  int packed_panel;         // the place of first_panel in the packed weight
  int scale_offset;         // from a channel of y to its place in weight_scale and bias
};

}  // namespace liquidgemm

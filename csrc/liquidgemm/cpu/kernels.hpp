// What one instruction set offers, as a table of functions, and the choice of the set.
#pragma once

#include <cstdint>

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/common/element.hpp"
#include "liquidgemm/common/norm.hpp"
#include "liquidgemm/formats/format_id.hpp"

namespace liquidgemm::cpu {

// Activations of some tokens, arranged for one Product.
struct Activations {
  int8_t* x;
  int32_t* group_sums;  // [tokens * groups], or twice: the sums of x over a group of a token
  int32_t* totals;      // [tokens]
  int64_t tokens;       // in whole tiles of the Product
  int64_t groups;
};

// y[m, n] = cast(float(sum) * x_scale[m] * weight_scale[n] + bias[n]), or the sum itself.
struct Output {
  void* y;
  Element type;
  int64_t tokens;  // those that are stored
  int64_t n;       // also the row stride of y
  float const* x_scale;
  float const* weight_scale;
  float const* bias;  // or null
};

// A way to multiply: how it wants the activations, and the product itself.
struct Product {
  int64_t tile;             // tokens that are arranged together
  int64_t bytes_per_group;  // of an arranged token

  // Arranges tokens [first, first + tile) from rows of int8 [groups * 64].
  void (*arrange)(int8_t const* rows, int64_t first, Activations const& to);

  // Bands [first, last) of the weight, which are counted through all panels, for all tokens.
  void (*multiply)(
      uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out);
};

// The quantizer's search for the grid of least squared error, of some rows (search.hpp). A matrix
// [span, columns] has one column per group, the rows' groups one after the other.
struct Search {
  float const* units;   // [span, columns], w / sigma
  float const* weight;  // [span, columns], of the squared errors, or null
  int64_t span, columns, rows;
  float *s, *z;           // [columns]
  float* q;               // [span, columns]
  float* refit;           // [rows], factors of sigma
  void* scratch;          // search_scratch bytes, aligned to 64
  int largest_code = 15;  // or 63
};

constexpr int64_t search_scratch(int64_t span, int64_t columns) {
  constexpr int64_t kLargestVector = 64, kResults = 6 * 3;
  return (2 * span + span / 2 + 1) * kLargestVector + kResults * columns * int64_t{sizeof(float)};
}

// A row of activations to be normed: y, of the type of x, is written before it is quantized.
struct RmsNormRow {
  void const* x;
  void const* residual;  // or null: then h is not written
  void const* weight;
  Element type;  // of x, residual, h and y
  Element weight_type;
  NormMode mode;
  float eps, offset;
  int64_t k;
  void *h, *y;
};

// A row of gates, and behind them the other factors.
struct GluRow {
  void const* gate_up;  // [2 k]
  Element type;
  GatedActivation activation;
  int64_t k;
  void* y;  // [k], as above
};

// The products with the weights of one format.
struct Products {
  Product few;          // tokens
  Product many;         // tokens
  int64_t fewest_many;  // tokens from which on `many` is the faster one
};

struct Kernels {
  char const* name;
  Products liquidquant, int8, liquidquant6, liquidquant_g32;  // in the order of FormatId

  // One row of K activations to int8, and its scale.
  float (*quantize)(void const* x, Element type, int64_t k, int8_t* out);
  // And of what is computed first.
  float (*rms_norm)(RmsNormRow const& row, int8_t* out);
  float (*glu)(GluRow const& row, int8_t* out);

  void (*search)(Search const& arguments);

  Product const& product(FormatId format, int64_t tokens) const {
    Products const& of = format == FormatId::kInt8             ? int8
                         : format == FormatId::kLiquidQuant6   ? liquidquant6
                         : format == FormatId::kLiquidQuantG32 ? liquidquant_g32
                                                               : liquidquant;
    return tokens < of.fewest_many ? of.few : of.many;
  }
};

// The sets that this processor and its operating system support, the fastest first, and how many.
// The last one is always there: portable C++.
Kernels const* const* supported_kernels(int* count);

// The set that runs now: the fastest one unless another one was chosen. null: the reference.
Kernels const* current_kernels();

// By name; "" takes the fastest set, "reference" none. False if there is no such set here.
bool choose_kernels(char const* name);

}  // namespace liquidgemm::cpu

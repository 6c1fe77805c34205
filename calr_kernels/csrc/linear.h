// Linear layers on a team of threads: what the C interface and a decoder's blocks are made of.
#pragma once

#include <cstdint>

#include "calr.h"
#include "team.h"

namespace calr {

// Elements from one row of a layer's outputs to the next: whole panels fit, and, since it is an odd number of
// lines, what lies below one another does not share its place in the cache.
inline int64_t room(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Elements of scratch that a layer takes for each row of x.
int64_t scratch_of(const calr_layer& layer);

// Weights that are read for each row of x: what a layer costs.
int64_t weights_of(const calr_layer& layer, int64_t k);

// outs[i] [m, room(n_i)] = layers[i] of x [m, k], rounded to x_type. Every thread of the team calls it, with
// the same arguments but for x, which may be its own copy; afterwards each may read what is its part
// (n_i, 16) of the outputs. scratch: m * the sum of scratch_of, shared.
void multiply(const Team& team, const calr_layer* layers, int64_t count, const float* x, int64_t m,
              int64_t k, int32_t x_type, float* const* outs, float* scratch);

// Have the beginning of what this thread will read of a layer of inputs [k] brought into the cache, while
// memory has nothing else to do.
void fetch(const Team& team, const calr_layer& layer, int64_t k);

// hidden [m, n_0] = act(layers[0] x) * layers[1] x, each step rounded to x_type: every thread its part
// (n_0, 16). layers[2] comes next, of hidden. scratch: m * (2 * room(n_0) + the sum of scratch_of).
void gate(const Team& team, const calr_layer* layers, const float* x, int64_t m, int64_t k,
          int32_t activation, int32_t x_type, float* hidden, float* scratch);

// In place: every value to x_type and back.
void round_to(int32_t x_type, float* values, int64_t count);

}  // namespace calr

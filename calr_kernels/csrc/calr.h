// The C interface of the native kernel: what the binding in Python calls with ctypes.
//
// Arrays are contiguous. Types of elements: 0 float32, 1 bfloat16, 2 float16. In linear layers x, y and
// biases have x_type. Accumulation is in float32, in a fixed order: the same bits for any number of
// threads. Memory that cannot be had ends the process.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One linear layer [n, K]: y = up (down x) + corrective_up (corrective_down x) + bias. With pivots, the
// outputs `pivots` are down x itself, up gives the others, and there is no corrective. r == 0: dense.
//
// Packed, every matrix of numbers [rows, columns] is [ceil(rows / 16)][columns][16]: 16 rows side by side,
// those beyond the last of zeros. Of bfloat16 it is [ceil(rows / 16)][ceil(columns / 2)][16][2].
//
// With panels (calr_pack) it is a quantised matrix in place of down and up, and corrective_up is transposed.
// Of x in float32 the products are in float32; of x in 16 bits they are sums of integers, x rounded to 16
// bits below the largest of a scale group. Where the corrective is packed, its factors are quantised, too,
// to 8 bits in groups of 32: corrective_down in panels, corrective_up records [groups along n, c] with
// levels in place of codes.
typedef struct calr_layer {
  const void* down;             // [r, K]
  const void* up;               // [n, r]; with pivots [n - r, r]; dense [n, K]
  const void* corrective_down;  // [c, K]
  const void* corrective_up;    // [n, c]; with panels [c, n]
  const void* bias;             // [n] or null
  const int32_t* pivots;        // [r] or null
  const int32_t* others;        // [n - r], ascending: the outputs that are not pivots
  const uint8_t* panels;        // or null
  const int8_t* table;          // [64]: the level of every code, not read for 8 bits
  int64_t n;
  int64_t r;
  int64_t c;      // 0: no corrective
  int64_t group;  // of panels, at most 512, a multiple of 32
  int32_t bits;   // of panels: 3, 4, 5, 6 or 8
  int32_t type;   // of down, up and the corrective
  int32_t packed;             // down, up and, without panels, the corrective: in panels of numbers
  int32_t packed_corrective;  // of a quantised matrix
} calr_layer;

// One block of a decoder: x += norm_1(attention(norm_0(x))), x += norm_3(gated(norm_2(x))).
typedef struct calr_block {
  const void* norms[4];     // RMS norms' weights [hidden size]; 1 and 3 may be null
  const void* q_norm;       // [d] or null, of every head
  const void* k_norm;       // [d] or null
  calr_layer attention[4];  // q, k, v, o
  calr_layer gated[3];      // gate, up, down
  int64_t heads;
  int64_t key_heads;
  int64_t d;
  int64_t window;      // of the last positions that are seen; 0: all are
  int32_t rotation;    // which of the rotations; -1: none
  int32_t activation;  // 0 SiLU, 1 GELU by tanh
  int32_t from_one;    // norms' weights count from 1
  float epsilon;
  float scale;
} calr_block;

// The keys and values that a block has seen, with room for those of the new token.
typedef struct calr_past {
  void* keys;        // [B, key heads, capacity, d]
  void* values;      // the same
  int64_t capacity;
  int64_t count;     // positions held
  int64_t dropped;   // earlier ones, held no longer
} calr_past;

// Returns the instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512.
int32_t calr_isa(void);

// Use another instruction set from now on. Returns 0, or -1 for one that this machine lacks.
int32_t calr_select_isa(int32_t isa);

// ys[i] [M, n_i] = layers[i] of x [M, K], i below count.
void calr_linears(const void* x, const calr_layer* layers, int64_t count, void* const* ys, int64_t m,
                  int64_t k, int32_t x_type, int32_t threads);

// y [M, n] = one layer of x [M, K], given by its parts, its `others` found here. Returns 0, or -1 for a
// pivot outside [0, n) or given twice.
int32_t calr_lowrank_linear(const void* x, const void* down, const void* up, const int32_t* pivots,
                            const void* bias, const void* corrective_down, const void* corrective_up,
                            void* y, int64_t m, int64_t k, int64_t n, int64_t r, int64_t c,
                            int32_t x_type, int32_t weight_type, int32_t threads);

// y [M, n_2] = layers[2] of act(layers[0] x) * layers[1] x, x [M, K]: a gated feed-forward block. Every
// intermediate rounds to x's type where separate operations would. activation: 0 SiLU, 1 GELU by tanh.
void calr_gated(const void* x, const calr_layer* layers, void* y, int64_t m, int64_t k,
                int32_t activation, int32_t x_type, int32_t threads);

// In place: x [B, hidden size], one token of each sequence, through blocks, which write its keys and
// values behind those of pasts. starts [B]: the first position that a sequence sees, or null.
// cosines[i], sines[i]: the i-th rotation, [B, d], or [d] where `shared`. All of x_type but the weights
// of linear layers. norm: the weight of a last norm, of the last block's form, or null. head: a layer
// behind that, whose outputs are `logits` [B, n]; or null, and x becomes the last hidden states.
void calr_decode(void* x, const calr_block* blocks, const calr_past* pasts, int64_t count,
                 const void* norm, const calr_layer* head, void* logits, const void* const* cosines,
                 const void* const* sines, int32_t shared, const int64_t* starts, int64_t b,
                 int64_t hidden_size, int32_t x_type, int32_t threads);

// Write into others [n - r] the outputs below n that are not among pivots [r], ascending. Returns 0, or
// -1 for a pivot outside [0, n) or given twice.
int32_t calr_complement(const int32_t* pivots, int32_t* others, int64_t n, int64_t r);

// y [M, n]: t [M, r] at the columns pivots [r], rest [M, n - r] at the others in ascending order, for
// elements of 2 or 4 bytes. Returns 0, or -1 for a pivot outside [0, n) or given twice.
int32_t calr_interleave(const void* t, const void* rest, const int32_t* pivots, void* y, int64_t m,
                        int64_t n, int64_t r, int32_t element_size, int32_t threads);

// y [M, K] = weight [K] * x / sqrt(mean(x^2) + epsilon) by rows, x [M, K]: what the weight multiplies is
// rounded first. All of one type.
void calr_rms_norm(const void* x, const void* weight, void* y, int64_t m, int64_t k, float epsilon,
                   int32_t type, int32_t threads);

// In place: every head [d] of x [M, heads, d] turned by the angles of cosines and sines, whose rows [d]
// lie `stride` elements apart: x * cos + (-second half, first half) * sin. Products round where separate
// operations would. All of one type.
void calr_rotate(void* x, const void* cosines, const void* sines, int64_t m, int64_t heads, int64_t d,
                 int64_t stride, int32_t type);

// y [B, heads * group, d] = softmax(scale * q keys') values: one query a head, q as y, and `group` of
// them to one of keys and values [B, heads, count, d]. All of one type.
void calr_attend(const void* q, const void* keys, const void* values, void* y, int64_t b,
                 int64_t heads, int64_t group, int64_t count, int64_t d, float scale, int32_t type,
                 int32_t threads);

// y [M, n] = records [n, groups] times x [M, K], plus bias [n] or null: a quantised linear layer. A
// record holds the scale and the codes of `group` weights, a multiple of 32, of 3, 4, 5, 6 or 8 bits;
// table: the level of every code, int8 [64], not read for 8 bits. Levels times inputs are summed in
// float32 over a group, and multiplied by its scale once.
void calr_quantized_linear(const void* x, const uint8_t* records, const int8_t* table,
                           const void* bias, void* y, int64_t m, int64_t k, int64_t n, int64_t group,
                           int32_t bits, int32_t x_type, int32_t threads);

// Write records [n, groups] as panels of 16 rows: [ceil(n / 16), groups, 16 * record] bytes.
void calr_pack(const uint8_t* records, uint8_t* panels, int64_t n, int64_t k, int64_t group, int32_t bits,
               int32_t threads);

// y [n, K] = the numbers of records [n, groups]: level * scale in float32, rounded to y's type. scales
// [n, groups] in place of the records' own, or null.
void calr_dequantize(const uint8_t* records, const float* scales, const int8_t* table, void* y, int64_t n,
                     int64_t k, int64_t group, int32_t bits, int32_t type, int32_t threads);

// sums [n, groups]: the levels of records [n, groups] times gradients [n, K], summed by scale groups: what
// a loss's gradient at the numbers is at their scales.
void calr_scale_gradients(const uint8_t* records, const int8_t* table, const void* gradients, float* sums,
                          int64_t n, int64_t k, int64_t group, int32_t bits, int32_t type, int32_t threads);

// scales [n, groups] of weights [n, K], numbers of float16 (where `coarse`, of bfloat16, too): for each
// group of weights along a row, at most 512, the scale under which they err least, weighed by importance
// [K]. cells [512]: the level nearest to every ratio from -128 in steps of a half; most: the largest
// level; tried [choices]: scales that are tried, over the one that makes the largest weight the largest
// level, 0 for none.
void calr_search(const void* weights, const float* importance, const float* cells, float most,
                 const float* tried, int64_t choices, float* scales, int64_t n, int64_t k, int64_t group,
                 int32_t coarse, int32_t type, int32_t threads);

// One block of at most 64 columns of GPTQ, columns by rows: codes and errors [b, n] of rest [b, n], under
// scales spreads [b, n], along the upper factor [b, b], whose rows lie `stride` apart: errors are what
// rounding lost, over the diagonal. cells as above, cell_codes [512]: the code of that level.
void calr_choose(const float* rest, const float* spreads, const float* factor, int64_t stride,
                 const float* cells, const uint8_t* cell_codes, uint8_t* codes, float* errors, int64_t b,
                 int64_t n, int32_t threads);

#ifdef __cplusplus
}
#endif

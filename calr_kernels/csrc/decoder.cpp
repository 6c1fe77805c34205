// Blocks of a decoder, one token of each sequence: one team of threads goes through all of them.
//
// Every thread holds its own copy of the residual stream, norms it, and computes its part of each linear
// layer; the team waits where one thread needs what the others made. Attention is split along the
// context in stretches of a fixed length, so that the same sums are taken for any number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"
#include "linear.h"

namespace {

using calr::room;
using calr::Team;

constexpr int64_t kStretch = 128;  // positions of the context that are gathered at once

struct Call {
  const void* const* cosines;
  const void* const* sines;
  const int64_t* starts;
  int64_t rotation_stride, b, hidden_size;
};

// What the team shares: large enough for every block.
struct Shared {
  std::vector<float> queries, keys, values, gathered, out, hidden, scratch;

  void fit(const Call& call, const calr_block* blocks, const calr_past* pasts, int64_t count,
           const calr_layer* head) {
    int64_t q = 0, k = 0, g = 0, h = 0, s = head ? calr::scratch_of(*head) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const calr_block& block = blocks[i];
      int64_t first = 0;
      for (int j = 0; j < 3; ++j) first += calr::scratch_of(block.attention[j]);
      int64_t second = 2 * room(block.gated[0].n);
      for (int j = 0; j < 2; ++j) second += calr::scratch_of(block.gated[j]);
      s = std::max({s, first, second, calr::scratch_of(block.attention[3]),
                    calr::scratch_of(block.gated[2])});
      q = std::max(q, room(block.attention[0].n)), k = std::max(k, room(block.attention[1].n));
      h = std::max(h, block.gated[0].n);
      g = std::max(g, block.heads * stretches(pasts[i]) * (block.d + 2));
    }
    queries.resize(call.b * q), keys.resize(call.b * k), values.resize(call.b * k);
    gathered.resize(call.b * g), hidden.resize(call.b * h), scratch.resize(call.b * s);
    out.resize(call.b * std::max(room(call.hidden_size), head ? room(head->n) : 0));
  }

  static int64_t stretches(const calr_past& past) { return past.count / kStretch + 1; }
};

// One thread's own.
struct Own {
  std::vector<float> x, normed, attended, heads, scores;
};

template <typename X>
class Decoder {
 public:
  Decoder(const Call& call, Shared& shared, Own& own, const Team& team)
      : call_(call), shared_(shared), own_(own), team_(team) {}

  void run(const calr_block& block, const calr_past& past) {
    attention(block, past);
    feed_forward(block);
  }

  // What is behind the last block: x, normed where there is a weight for that, and the head's outputs.
  void end(const calr_block& block, const void* weight, const calr_layer* head, X* x, X* logits) {
    const int64_t b = call_.b, h = call_.hidden_size;
    const float* last = own_.x.data();
    if (weight) {
      norm(block, last, weight, own_.normed.data(), b, h);
      last = own_.normed.data();
    }
    if (!head) {
      const auto [begin, end] = team_.part(b * h);
      CALR_BY_ISA(narrow_all, last + begin, x + begin, end - begin);
      return;
    }
    float* out = shared_.out.data();
    calr::fetch(team_, *head, h);
    team_.wait();  // for whoever still adds what lies there
    calr::multiply(team_, head, 1, last, b, h, type(), &out, shared_.scratch.data());
    const auto [begin, end] = team_.part(head->n, 16);
    for (int64_t row = 0; row < b; ++row) {
      const float* from = out + row * room(head->n);
      CALR_BY_ISA(narrow_all, from + begin, logits + row * head->n + begin, end - begin);
    }
  }

 private:
  void norm(const calr_block& block, const float* x, const void* weight, float* y, int64_t rows,
            int64_t width) {
    CALR_BY_ISA(rms_norm, x, static_cast<const X*>(weight), y, width, block.epsilon, block.from_one != 0,
                int64_t{0}, rows);
  }

  static constexpr int32_t type() {
    return std::is_same<X, float>::value ? kFloat32
           : std::is_same<X, bfloat16>::value ? kBFloat16
                                              : kFloat16;
  }

  // x += out, normed first where the block does.
  void add(const calr_block& block, const void* weight) {
    const int64_t h = call_.hidden_size;
    for (int64_t row = 0; row < call_.b; ++row) {
      const float* from = shared_.out.data() + row * room(h);
      if (weight) {
        norm(block, from, weight, own_.normed.data(), 1, h);
        from = own_.normed.data();
      }
      CALR_BY_ISA(add_rounded<X>, own_.x.data() + row * h, from, h);
    }
  }

  void attention(const calr_block& block, const calr_past& past) {
    const int64_t h = call_.hidden_size;
    calr::fetch(team_, block.attention[0], h);
    norm(block, own_.x.data(), block.norms[0], own_.normed.data(), call_.b, h);
    float* outs[3] = {shared_.queries.data(), shared_.keys.data(), shared_.values.data()};
    calr::multiply(team_, block.attention, 3, own_.normed.data(), call_.b, h, type(), outs,
                   shared_.scratch.data());
    team_.wait();
    calr::fetch(team_, block.attention[3], block.heads * block.d);
    const int64_t all = Shared::stretches(past);
    const auto [begin, end] = team_.part(call_.b * block.key_heads * all);
    for (int64_t i = begin; i < end; ++i) {
      gather(block, past, i / all / block.key_heads, i / all % block.key_heads, i % all);
    }
    team_.wait();
    bring_together(block, past);
    float* out = shared_.out.data();
    calr::multiply(team_, block.attention + 3, 1, own_.attended.data(), call_.b, block.heads * block.d,
                   type(), &out, shared_.scratch.data());
    team_.wait();
    add(block, block.norms[1]);
  }

  void feed_forward(const calr_block& block) {
    const int64_t h = call_.hidden_size;
    calr::fetch(team_, block.gated[0], h);
    norm(block, own_.x.data(), block.norms[2], own_.normed.data(), call_.b, h);
    calr::gate(team_, block.gated, own_.normed.data(), call_.b, h, block.activation, type(),
               shared_.hidden.data(), shared_.scratch.data());
    team_.wait();
    float* out = shared_.out.data();
    calr::multiply(team_, block.gated + 2, 1, shared_.hidden.data(), call_.b, block.gated[0].n, type(),
                   &out, shared_.scratch.data());
    team_.wait();
    add(block, block.norms[3]);
  }

  // The first of the positions held that a sequence sees.
  int64_t start(const calr_block& block, const calr_past& past, int64_t b) const {
    const int64_t first = std::max<int64_t>(0, (call_.starts ? call_.starts[b] : 0) - past.dropped);
    return block.window ? std::max(first, past.count + 1 - block.window) : first;
  }

  // A head [d] as attention takes it: normed and turned.
  void turn(const calr_block& block, const void* weight, int64_t b, float* head) {
    if (weight) {
      norm(block, head, weight, own_.scores.data(), 1, block.d);
      std::copy_n(own_.scores.data(), block.d, head);
    }
    if (block.rotation < 0) return;
    const int64_t at = b * call_.rotation_stride;
    CALR_BY_ISA(rotate, head, static_cast<const X*>(call_.cosines[block.rotation]) + at,
                static_cast<const X*>(call_.sines[block.rotation]) + at, block.d);
  }

  // What the queries of one key head find in one stretch of a sequence; the last one writes the new
  // token's key and value first.
  void gather(const calr_block& block, const calr_past& past, int64_t b, int64_t head, int64_t stretch) {
    const int64_t d = block.d, group = block.heads / block.key_heads;
    const int64_t from = std::max(start(block, past, b), stretch * kStretch);
    const int64_t to = std::min(past.count + 1, (stretch + 1) * kStretch);
    own_.scores.resize(std::max(d, group * kStretch));
    if (to == past.count + 1) append(block, past, b, head);
    if (from >= to) return;
    const float* queries = shared_.queries.data() + b * room(block.heads * d) + head * group * d;
    own_.heads.assign(queries, queries + group * d);
    float* q = own_.heads.data();
    for (int64_t i = 0; i < group; ++i) turn(block, block.q_norm, b, q + i * d);
    for (int64_t i = 0; i < group * d; ++i) q[i] *= block.scale;
    const int64_t at = ((b * block.key_heads + head) * past.capacity + from) * d;
    float* most = gathered(block, past, b, head * group, stretch);
    float *total = most + group, *out = total + group;
    CALR_BY_ISA(gather, q, static_cast<const X*>(past.keys) + at, static_cast<const X*>(past.values) + at,
                most, total, out, group, to - from, d, own_.scores.data());
  }

  void append(const calr_block& block, const calr_past& past, int64_t b, int64_t head) {
    const int64_t d = block.d, width = room(block.key_heads * d);
    const float* key = shared_.keys.data() + b * width + head * d;
    const float* value = shared_.values.data() + b * width + head * d;
    own_.heads.assign(key, key + d);
    turn(block, block.k_norm, b, own_.heads.data());
    const int64_t at = ((b * block.key_heads + head) * past.capacity + past.count) * d;
    for (int64_t i = 0; i < d; ++i) {
      narrow(own_.heads[i], static_cast<X*>(past.keys) + at + i);
      narrow(value[i], static_cast<X*>(past.values) + at + i);
    }
  }

  // Where the queries of a key head, of which `head` is the first, keep what they found in a stretch.
  float* gathered(const calr_block& block, const calr_past& past, int64_t b, int64_t head, int64_t stretch) {
    const int64_t all = Shared::stretches(past), group = block.heads / block.key_heads;
    return shared_.gathered.data() +
           ((b * block.key_heads + head / group) * all + stretch) * group * (block.d + 2);
  }

  void bring_together(const calr_block& block, const calr_past& past) {
    const int64_t d = block.d, group = block.heads / block.key_heads;
    const int64_t stride = group * (d + 2), parts = Shared::stretches(past);
    own_.attended.resize(call_.b * block.heads * d);
    for (int64_t b = 0; b < call_.b; ++b) {
      const int64_t first = start(block, past, b) / kStretch;
      for (int64_t head = 0; head < block.heads; ++head) {
        const int64_t own = head % group;
        const float* most = gathered(block, past, b, head - own, first);
        const float *total = most + group, *out = total + group;
        CALR_BY_ISA(bring_together, most + own, total + own, out + own * d,
                    own_.attended.data() + (b * block.heads + head) * d, parts - first, stride, d);
      }
    }
    calr::round_to(type(), own_.attended.data(), call_.b * block.heads * d);
  }

  const Call& call_;
  Shared& shared_;
  Own& own_;
  const Team& team_;
};

}  // namespace

void calr_decode(void* x, const calr_block* blocks, const calr_past* pasts, int64_t count,
                 const void* norm, const calr_layer* head, void* logits, const void* const* cosines,
                 const void* const* sines, int32_t shared, const int64_t* starts, int64_t b,
                 int64_t hidden_size, int32_t x_type, int32_t threads) {
  if (count < 1) return;
  const Call call{cosines, sines, starts, shared ? 0 : blocks[0].d, b, hidden_size};
  thread_local Shared buffers;
  Shared& of_all = buffers;  // of the calling thread: a thread_local is each thread's own
  of_all.fit(call, blocks, pasts, count, head);
  int64_t operations = 0;
  for (int i = 0; i < 4; ++i) operations += calr::weights_of(blocks[0].attention[i], hidden_size);
  for (int i = 0; i < 3; ++i) operations += calr::weights_of(blocks[0].gated[i], hidden_size);
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    X* out = static_cast<X*>(x);
    calr::together(calr::useful(threads, b * operations), [&](const Team& team) {
      thread_local Own own;
      own.x.resize(b * hidden_size), own.normed.resize(b * hidden_size);
      for (int64_t i = 0; i < b * hidden_size; ++i) own.x[i] = widen(out[i]);
      Decoder<X> decoder(call, of_all, own, team);
      for (int64_t i = 0; i < count; ++i) decoder.run(blocks[i], pasts[i]);
      decoder.end(blocks[count - 1], norm, head, out, static_cast<X*>(logits));
    });
  });
}

// What updates the weights in the tail's step on slabs: warps that add up the parts of dW that others leave in a ring in memory.
// slab_tail.cu, which this file goes before, tells of the whole; slab.cuh goes before both.
//
// The last bit of each word of 8 bytes in the ring, which is read and written whole, is the mark of its round: of two rounds in the same
// slot it is 0 and 1 in turns. It is taken off before a part is used, so that no result depends on when a group had its turn.
//
// A slot is read and written in order without a fence: a pair's rounds k and k + 2 are one updating warp's, at the same addresses, so that
// it never sees a part of k - 2 RING again once it has seen k - RING's; and a round is written once all S slabs have counted k - RING.

constexpr int WARPS = 12, UPDATERS = 4, F = 64, G = 16, RING = 4;
// Bytes that wait for a warp: weights, then index, biases and bounds of positives, of two rounds.
constexpr int WEIGHTS = 2 * G * F, BIASES = 2 * F, BOUNDS = BIASES + 4 * G, REST = BOUNDS + 16, STAGE = WEIGHTS + 2 * REST;
constexpr int EYES = 2 * 32 * 16;  // bytes of two unit matrices
// dz is multiplied by UP, so that small probabilities are float16. Sums of dx are kept times DX_UP, by weights times DX_UP / UP: they end
// at 4,094, and weights below 2^-13 lose bits there, at most 2^-21.
constexpr float UP = 256, DX_UP = 16, LOG2E = 1.4426950408889634f;

struct Args {
  const unsigned short* x;  // (D, NP) bfloat16, in: x transposed
  unsigned short *weight, *momentum;  // (T, G, F) bfloat16, in and out; momentum may be null
  const short* index;  // (T, F), in
  float *bias, *bias_momentum;  // (T, G) or null, in and out
  float* dx;  // (ranges, D, NP), out, unscaled
  double* loss;  // (programs, WARPS), out, unscaled; may be null
  u64* ring;  // (ranges, WARPS, record_words(S)), zeros
  const i64* bounds;  // (T + 1,), in: where each group's positives begin
  const int* pairs;  // (P,), in: batch row times G plus label of the group
  int n, groups, padding /* T G - L */, ranges, flush /* rounds between sums of dx in float32, a power of two */;
  i64 first_row;
  u32 step, seed_low, seed_high;
  float lr, scale /* of the loss, by UP */, decay, inertia;
};

// Words of 8 bytes: a unit is labels u and u + 8 of a group, S parts of dW and then of the biases' gradient; a record is what a warp has:
// a ring of rounds of 8 units, then the rounds taken from it, even and odd ones apart, for other warps take them.
__host__ __device__ constexpr int unit_words(int s) { return s * 32 + (s + 1) / 2 * 2; }
__host__ __device__ constexpr int record_words(int s) { return RING * 8 * unit_words(s) + (s + 1) / 2 * 2; }

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }  // of two bfloat16
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ void philox(u32 (&c)[4], u32 key0, u32 key1) {  // rounding.py's generator, 7 rounds
#pragma unroll
  for (int i = 0; i < 7; i++) {
    const u64 a = (u64)c[0] * 0xD2511F53u, b = (u64)c[2] * 0xCD9E8D57u;
    const u32 next0 = (u32)(b >> 32) ^ c[1] ^ key0, next2 = (u32)(a >> 32) ^ c[3] ^ key1;
    c[1] = (u32)b, c[3] = (u32)a, c[0] = next0, c[2] = next2;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

template <bool NEAREST>
__device__ __forceinline__ uint4 rounded(const float (&v)[8], i64 row, u32 block, u32 stream, const Args& args) {  // eight neighbours
  u32 random[4] = {block, (u32)row, (u32)(row >> 32) | stream << 16, args.step}, bits[8];
  if (!NEAREST) philox(random, args.seed_low, args.seed_high);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const u32 b = __float_as_uint(v[e]);
    const u32 more = NEAREST ? 0x7fff + (b >> 16 & 1) : e % 2 ? random[e / 2] >> 16 : random[e / 2] & 0xffff;
    bits[e] = v[e] == v[e] ? b + more : 0x7fff0000u;
  }
  return make_uint4(__byte_perm(bits[0], bits[1], 0x7632), __byte_perm(bits[2], bits[3], 0x7632),
                    __byte_perm(bits[4], bits[5], 0x7632), __byte_perm(bits[6], bits[7], 0x7632));
}

// ---- Memory

// Four bfloat16 for the ring: the first is the nearest one whose last bit is 0, then `mark` takes that bit; a NaN's, too, or somebody would
// wait forever. One of all ones is not rounded, which would make it zero.
__device__ __forceinline__ u64 marked(const float (&a)[4], const float (&b)[4], int e, u32 mark) {
  const u32 bits = __float_as_uint(a[e]), even = a[e] == a[e] ? bits + 0xffff + (bits >> 17 & 1) & 0xfffe0000u : 0x7ffe0000u;
  return (pack<true>(__uint_as_float(even), a[e + 1]) & ~1u | mark) | (u64)pack<true>(b[e], b[e + 1]) << 32;
}

// ---- The updaters

// The first unit of a pair of groups that is a slab's, which has each S-th after it: never the same slab has more of all pairs.
__host__ __device__ constexpr int first_unit(int s, int slab, int pair) { return (slab + pair * (s - 8 % s)) % s; }

// Half of a warp updates two labels, u and u + 8, of a group.
template <int S, bool MOMENTUM, bool NEAREST>
__device__ __forceinline__ void update(const Args& args, int slab, int range, int first, int end, int rounds) {
  const int lane = threadIdx.x % 32, column = lane % 16;
  int k = 0, pair = threadIdx.x / 32 - WARPS;  // groups of a round by twos
  while (true) {
    while (pair >= WARPS / 2) pair -= WARPS / 2, k++;
    if (k >= rounds) return;
    const int w = 2 * pair + lane / 16, t = first + k * WARPS + w;
    const bool real = t < end, has = real && column < 2 * S;
    const u32 mark = (u32)k / RING + 1 & 1;
    for (int u = first_unit(S, slab, pair); u < 8; u += S) {
      u64* record = args.ring + (range * WARPS + w) * (i64)record_words(S);
      const u64* from = record + (u32)k % RING * (8 * unit_words(S)) + u * unit_words(S);
      const i64 label = (i64)t * G + u, mine = label + column / 8 * 8, at = mine * F + column % 8 * 8;
      uint4 old = {}, inert = {};
      float own = 0;  // columns 0 and 1: biases, 2 and 3: their momentum
      if (real) {
        old = *(const uint4*)(args.weight + at);
        if (MOMENTUM) inert = *(const uint4*)(args.momentum + at);
        if (args.bias && (column < 2 || column < 4 && args.bias_momentum))
          own = (column < 2 ? args.bias : args.bias_momentum)[label + column % 2 * 8];
      }
      u64 part[S][2];
      u32 few = mark;  // columns by twos: a slab's part of the biases' gradient
      while (true) {
        u32 differ = 0;
        if (real) {
#pragma unroll
          for (int s = 0; s < S; s++) load_parts(part[s], from + s * 32 + 2 * column);
          if (has) few = load_word((const u32*)(from + S * 32) + column);
#pragma unroll
          for (int s = 0; s < S; s++) differ |= (u32)part[s][0] ^ mark, differ |= (u32)part[s][1] ^ mark;
          differ |= few ^ mark;
        }
        if (!__any_sync(~0u, differ & 1)) break;
        __nanosleep(200);
      }
      float g[8] = {}, v[8], next[8];
      if (real)
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const u32 word = (u32)(part[s][e / 2] >> 32 * (e % 2));
            g[2 * e] += low(e % 2 ? word : word & ~1u), g[2 * e + 1] += high(word);
          }
      if (column == 0 && real && u + S >= 8) store_word((u32*)(record + RING * 8 * unit_words(S)) + k % 2 * S + slab, k + 1);
      const u32 weights[4] = {old.x, old.y, old.z, old.w}, inertias[4] = {inert.x, inert.y, inert.z, inert.w};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float weight = e % 2 ? high(weights[e / 2]) : low(weights[e / 2]);
        v[e] = fmaf(g[e], args.scale, weight * args.decay);
        if (MOMENTUM) v[e] = fmaf(e % 2 ? high(inertias[e / 2]) : low(inertias[e / 2]), args.inertia, v[e]);
        next[e] = fmaf(v[e], -args.lr, weight);
      }
      if (real) {
        if (MOMENTUM) *(uint4*)(args.momentum + at) = rounded<NEAREST>(v, args.first_row + mine, column % 8, 1, args);
        *(uint4*)(args.weight + at) = rounded<NEAREST>(next, args.first_row + mine, column % 8, 0, args);
      }
      if (args.bias) {
        float sum = has ? __uint_as_float(few & ~1u) : 0;
#pragma unroll
        for (int o = 8; o > 1; o /= 2)
          if (o / 2 < S) sum += __shfl_xor_sync(~0u, sum, o);
        const float inertia = __shfl_xor_sync(~0u, own, 2);
        if (column < 2 && real) {
          float v = sum * args.scale;
          if (args.bias_momentum) args.bias_momentum[label + column * 8] = v = fmaf(inertia, args.inertia, v);
          args.bias[label + column * 8] = fmaf(v, -args.lr, own);
        }
      }
    }
    pair += UPDATERS;
  }
}


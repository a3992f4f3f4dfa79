// One step of the sparse tail on NVIDIA GPUs, from slabs in shared memory (slab.cuh and slab_update.cuh, which go before this file);
// slab_tail.py compiles and launches it.
//
//     z = W x[index] + b     dz = sigmoid(z) - y     dx[index] += W^T dz     dW = dz x[index]^T     W, m, b <- SGD
//
// A program (one a multiprocessor) keeps 32 P batch rows of x in shared memory, and their dx, both in float16. The S programs of a range of
// groups hold all N rows and go through the same groups, WARPS of them a round. A group's dW is the sum of what S programs have, so each
// leaves its part in a ring in memory, and warps that do nothing else add the parts and update the weights, every program an S-th of
// every group. No atomic additions: warps add to dx in turns, and parts are summed in order, so the same bits each time.
//
// Nobody waits for a fence: a bit of each word in the ring tells that it is of this round and not of the ring's last one (slab_update.cuh);
// an updater counts the rounds that it has taken, and no slot is written before that. All S programs must run at once: there are no more
// programs than multiprocessors.
//
// Letters: N batch rows, NP with padding, D features of x, T groups, G labels a group, F fan-in, S slabs, P parts of 32 rows a slab.

// ---- Arithmetic

__device__ __forceinline__ u32 half_of(u32 pair) { return pack<false>(low(pair), high(pair)); }

__device__ __forceinline__ float sigmoid(float z, float bias) {  // times UP; the bias is already times -LOG2E
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fmaf(z, -LOG2E, bias)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(power, 1 / UP, 1 / UP)));
  return inverse;
}

__device__ __forceinline__ void product(u32& c0, u32& c1, const u32 (&a)[4], u32 b0, u32 b1) {  // in float16
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
      : "=r"(c0), "=r"(c1) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

__device__ __forceinline__ float loss_of(const float (&logit)[16], u32 hot) {  // a warp's sum of softplus(z) - y z
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float grows = hot >> i & 1 ? -logit[i] : logit[i];  // softplus(z) - z is softplus(-z)
    sum += fmaxf(grows, 0) + log1pf(expf(-fabsf(grows)));
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  return sum;
}

// ---- The kernel

// A lane's places, of a tile of 16 features (c, j), 8 labels (m) and 32 batch rows: features 32 c + 8 (r/2) + 2 j + r%2 and labels
// r + 8 m of operands, labels 2 q + 8 m and the next of results; batch rows 8 q + .. of x, 8 (r/2) + 2 j + r%2 of results.
template <int D, int S, int P, bool MOMENTUM, bool NEAREST, bool LOSS /* which changes no other result's bits */>
__global__ void __launch_bounds__((WARPS + UPDATERS) * 32, 1) slab_tail_step(
    const unsigned short* x, unsigned short* weight, unsigned short* momentum, const short* index, float* bias, float* bias_momentum,
    float* dx, double* loss, u64* ring, const i64* bounds, const int* pairs, int n, int groups, int padding, int ranges, int flush,
    int first_low, int first_high, int step, int seed_low, int seed_high, int lr, int scale, int decay, int inertia) {  // floats' bits
  const Args args = {x, weight, momentum, index, bias, bias_momentum, dx, loss, ring, bounds, pairs, n, groups, padding, ranges, flush,
                     (i64)first_high << 32 | (u32)first_low, (u32)step, (u32)seed_low, (u32)seed_high, __int_as_float(lr),
                     __int_as_float(scale), __int_as_float(decay), __int_as_float(inertia)};
  extern __shared__ __align__(128) unsigned char shared[];  // x, dx: [P parts][D][32 rows] float16; then what waits for each warp, and EYES
  __shared__ u64 turns[P * WARPS];
  constexpr int PART = D * 64, NP = 32 * P * S;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
  const int slab = blockIdx.x % S, range = blockIdx.x / S, first_batch = 32 * P * slab;
  const int first = (i64)groups * range / ranges, end = (i64)groups * (range + 1) / ranges, rounds = (end - first + WARPS - 1) / WARPS;
  const u32 xs = shared_address(shared), ds = xs + P * PART, eyes = ds + P * PART + WARPS * STAGE;
  start_turns<WARPS>(turns, P);
  for (int i = threadIdx.x; i < P * D * 4; i += blockDim.x) {
    const int part = i / (D * 4), d = i / 4 % D;
    const uint4 v = *(const uint4*)(x + (i64)d * NP + first_batch + 32 * part + i % 4 * 8);
    store_shared(xs + i * 16, make_uint4(half_of(v.x), half_of(v.y), half_of(v.z), half_of(v.w)));
    store_shared(ds + i * 16, make_uint4(0, 0, 0, 0));
  }
  // A product with the unit matrix transposes: what it is made of must come from memory, or the compiler makes it anew each time. The
  // second one is DX_UP / UP, and scales as it transposes. There are registers for one.
  if (warp < 2) {
    const u32 one = warp ? 0x2c00 : 0x3c00, corner = (r == 2 * q ? one : 0) | (r == 2 * q + 1 ? one << 16 : 0);
    store_shared(eyes + threadIdx.x * 16, make_uint4(corner, 0, 0, corner));
  }
  __syncthreads();
  open_turns<WARPS>(turns, P);
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
    update<S, MOMENTUM, NEAREST>(args, slab, range, first, end, rounds);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
  const auto synchronize = [] { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); };  // without the updaters
  u32 identity[4];
  auto load_identity = [&](int which) {
    const uint4 v = load_shared(eyes + which * 512 + lane * 16);
    identity[0] = v.x, identity[1] = v.y, identity[2] = v.z, identity[3] = v.w;
  };
  load_identity(0);
  u64* record = ring + (range * WARPS + warp) * (i64)record_words(S);
  const u32* taken = (const u32*)(record + RING * 8 * unit_words(S)) + lane;
  // Registers are short: a group's operands are copied to shared memory a round ahead, for loaded early they would be spilled.
  const u32 stage = ds + P * PART + warp * STAGE, stage_weights = stage + lane / 8 * 128 + (lane % 8 ^ lane / 8 % 2 * 4) * 16;
  const bool of_index = lane < 16, of_bias = !of_index && lane < 24;
  const unsigned short* next_weights = weight + (i64)(first + warp) * (G * F) + lane * 8;
  const char* next_rest = of_index ? (const char*)(index + (i64)(first + warp) * F + lane * 4)
                          : of_bias ? (const char*)(bias + (i64)(first + warp) * G + (lane - 16) * 2)
                                    : (const char*)(bounds + first + warp + lane - 24);
  const int stride = WARPS * (of_index ? 2 * F : of_bias ? 4 * G : 8);
  const bool has_rest = of_bias ? bias != nullptr : lane < 26;
  auto fetch = [&](int k) {  // round k, the one after what was fetched last
#pragma unroll
    for (int i = 0; i < 4; i++) copy_async<16>(stage_weights + i * 512, next_weights + i * 256);
    if (has_rest) copy_async<8>(stage + WEIGHTS + k % 2 * REST + lane * 8, next_rest);
    next_weights += WARPS * G * F, next_rest += stride;
  };
  auto bounds_of = [&](int k, int& begin, int& stop) {
    const u32 at = stage + WEIGHTS + k % 2 * REST + BOUNDS;
    asm volatile("{.reg .b32 u, v; ld.shared.v4.b32 {%0, u, %1, v}, [%2];}" : "=r"(begin), "=r"(stop) : "r"(at));
  };
  int next_pair = 0;
  auto fetch_pairs = [&](int k) {  // the lane's of the first 32, when what `fetch` fetched is there
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    int begin, stop;
    bounds_of(k, begin, stop);
    if (begin + lane < stop) next_pair = pairs[begin + lane];
  };
  auto empty = [&](bool again) {  // sums of dx, to float32
    for (int i = threadIdx.x; i < P * D * 4; i += WARPS * 32) {
      const int part = i / (D * 4), d = i / 4 % D;
      const uint4 v = load_shared(ds + i * 16);
      store_shared(ds + i * 16, make_uint4(0, 0, 0, 0));
      float2* to = (float2*)(dx + ((i64)range * D + d) * NP + first_batch + 32 * part + i % 4 * 8);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float2 f;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(f.x), "=f"(f.y) : "r"(words[e]));
        const float2 before = again ? to[e] : make_float2(0, 0);
        to[e] = make_float2(fmaf(f.x, 1 / DX_UP, before.x), fmaf(f.y, 1 / DX_UP, before.y));
      }
    }
  };
  double total = 0;
  int t = first + warp;
  if (t < end) fetch(0), fetch_pairs(0);
  for (int k = 0; k < rounds; k++, t += WARPS) {
    if (k > 0 && (k & flush - 1) == 0) {
      synchronize();
      empty(k > flush);
      synchronize();
    }
    if (t >= end) continue;  // in the last round alone
    const u32 rest = stage + WEIGHTS + k % 2 * REST;
    u32 place[8], w[2][8];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const uint4 v = load_shared(rest + 64 * c + 16 * (r / 2));
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) place[4 * c + j] = xs + q * 16 + __byte_perm(words[j], 0, r % 2 ? 0x4432 : 0x4410) * 64;
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const uint4 u = load_shared(stage + (r + 8 * m) * 128 + ((4 * c + q) ^ r % 2 * 4) * 16);
        w[m][4 * c] = half_of(u.x), w[m][4 * c + 1] = half_of(u.y), w[m][4 * c + 2] = half_of(u.z), w[m][4 * c + 3] = half_of(u.w);
      }
    }
    __syncwarp();
    if (t + WARPS < end) fetch(k + 1);
    if (t + 2 * WARPS < end && lane < 16) prefetch(next_weights + lane * 56);
    const bool ragged = (t + 1 - groups) * G + padding > 0 || first_batch + 32 * P > n;
    const int first_pair = next_pair;
    u32 done = 0;
    float dw[8][4] = {}, db[4] = {};
#pragma unroll 1  // or registers are spilled
    for (int h = 0; h < P; h++) {
      u32 X[4][2][4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint4 v = load_shared(place[i] + h * PART);
        X[i / 2][i % 2][0] = v.x, X[i / 2][i % 2][1] = v.y, X[i / 2][i % 2][2] = v.z, X[i / 2][i % 2][3] = v.w;
      }
      float z[2][2][4];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          u32 a[4];
          product(a[0], a[1], identity, X[i][0][2 * c], X[i][0][2 * c + 1]);
          product(a[2], a[3], identity, X[i][1][2 * c], X[i][1][2 * c + 1]);
#pragma unroll
          for (int m = 0; m < 2; m++) {
            if (i == 0) multiply(z[c][m], a, w[m][0], w[m][1]);
            else multiply_add<false>(z[c][m], a, w[m][2 * i], w[m][2 * i + 1]);
          }
        }
      float b[2][2] = {};
      if (bias)
#pragma unroll
        for (int m = 0; m < 2; m++)
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b[m][0]), "=f"(b[m][1]) : "r"(rest + BIASES + 8 * q + 32 * m));
      float logit[LOSS ? 16 : 1];
      u32 hot = 0;  // bits: which of them are positives'
      if constexpr (LOSS)
#pragma unroll
        for (int i = 0; i < 16; i++) logit[i] = z[i / 8][i / 4 % 2][i % 4] + b[i / 4 % 2][i % 2];
#pragma unroll
      for (int i = 0; i < 16; i++) z[i / 8][i / 4 % 2][i % 4] = sigmoid(z[i / 8][i / 4 % 2][i % 4], b[i / 4 % 2][i % 2] * -LOG2E);
      int begin, stop;
      bounds_of(k, begin, stop);
      int last = -1;
      for (int p = begin; p < stop; p += 32) {  // each lane has one; those of these batch rows are told to all
        int pair = -1;
        if (p + lane < stop) pair = p == begin ? first_pair : pairs[p + lane];
        const int before = __shfl_up_sync(~0u, pair, 1), of = pair / G - first_batch - 32 * h;
        u32 here = __ballot_sync(~0u, pair >= 0 && of >= 0 && of < 32 && pair != (lane ? before : last));  // the same pair counts once
        last = __shfl_sync(~0u, pair, 31);
        while (here) {
          const int told = __shfl_sync(~0u, of * G + pair % G, __ffs(here) - 1), row = told / G, g = told % G, j = row / 2 % 4;
          const int code = row / 8 * 2 + row % 2 == r && g % 8 / 2 == q ? j / 2 * 8 + g / 8 * 4 + j % 2 * 2 + g % 2 : -1;
          here &= here - 1;
          if (LOSS && code >= 0) hot |= 1u << code;
#pragma unroll
          for (int i = 0; i < 16; i++) z[i / 8][i / 4 % 2][i % 4] -= code == i ? UP : 0.f;
        }
      }
      if (ragged)
#pragma unroll
        for (int i = 0; i < 16; i++) {
          const int j = i / 8 * 2 + i / 2 % 2, of = first_batch + 32 * h + 8 * (r / 2) + 2 * j + r % 2;
          if (of >= n || (t - groups) * G + padding + 8 * (i / 4 % 2) + 2 * q + i % 2 >= 0) {
            z[i / 8][i / 4 % 2][i % 4] = 0;
            if constexpr (LOSS) logit[i] = __int_as_float(0xff800000), hot &= ~(1u << i);
          }
        }
      if constexpr (LOSS) total += loss_of(logit, hot);
      u32 dz[4][2], turned[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int m = 0; m < 2; m++) dz[j][m] = pack<false>(z[j / 2][m][2 * (j % 2)], z[j / 2][m][2 * (j % 2) + 1]);
        product(turned[j][0], turned[j][1], identity, dz[j][0], dz[j][1]);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const u32 a[4] = {turned[j][0], turned[j][1], turned[j + 1][0], turned[j + 1][1]};
#pragma unroll
        for (int i = 0; i < 8; i++) multiply_add<false>(dw[i], a, X[i / 2][i % 2][j], X[i / 2][i % 2][j + 1]);
        multiply_add<false>(db, a, 0x3c003c00u, 0x3c003c00u);
      }
      load_identity(1);
      u32 v[4][2][4];  // this group's part of dx
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 a[4];
        product(a[0], a[1], identity, w[0][2 * i], w[0][2 * i + 1]);
        product(a[2], a[3], identity, w[1][2 * i], w[1][2 * i + 1]);
#pragma unroll
        for (int j = 0; j < 4; j++) product(v[i][0][j], v[i][1][j], a, dz[j][0], dz[j][1]);
      }
      load_identity(0);
      if (h == P - 1 && t + WARPS < end) fetch_pairs(k + 1);
      if (h == P - 1 && k >= RING && lane < S) done = load_word(taken + k % 2 * S);
      await_turn(turns + h * WARPS + warp, k % 2);
      uint4 sum[8];
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = load_shared(place[i] + (P + h) * PART);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32(&more)[4] = v[i / 2][i % 2];
        store_shared(place[i] + (P + h) * PART,
                     make_uint4(add(sum[i].x, more[0]), add(sum[i].y, more[1]), add(sum[i].z, more[2]), add(sum[i].w, more[3])));
      }
      pass_turn(turns + h * WARPS + (warp + 1 < WARPS ? warp + 1 : 0));
    }
    if (k >= RING)  // the slot's last round must have been taken
      while (__any_sync(~0u, lane < S && done < (u32)(k - RING + 1)))
        if (lane < S) done = load_word(taken + k % 2 * S);
    const u32 mark = (u32)k / RING + 1 & 1;
    u64* unit = record + (u32)k % RING * (8 * unit_words(S)) + r * unit_words(S);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int j = i % 2 * 4, e = i / 2 * 2;
      store_parts(unit + slab * 32 + 2 * q + 8 * i, marked(dw[j], dw[j + 1], e, mark), marked(dw[j + 2], dw[j + 3], e, mark));
    }
    if (q < 2) store_word((u32*)(unit + S * 32 + slab) + q, __float_as_uint(q ? db[2] : db[0]) & ~1u | mark);
  }
  if (LOSS && lane == 0) loss[blockIdx.x * WARPS + warp] = total;
  synchronize();
  empty(rounds > flush);
}

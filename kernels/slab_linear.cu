// Two operations of the group-shared linear layer on NVIDIA GPUs, from a slab in shared memory (slab.cuh, which goes before this
// file); slab_linear.py compiles and launches them.
//
//     forward  z_NL = x_ND[index] W^T + b          grad_x  dx_ND[index] += dz_NL W
//
// A program (one a multiprocessor) keeps all D features of some batch rows in shared memory, as x or as the float32 sum of dx, and takes
// groups from its range; a warp takes a group at a time. So gathers read, and sums are added, inside the multiprocessor, where atomic
// additions to the second-level cache took most of the time. Warps add to dx in turns, in the order of their groups: same bits each time.
//
// Letters: N batch rows, D features of x, T groups, G labels a group, F fan-in, L labels, P parts of a slab.

// ---- Loads and stores

// K neighbouring values as pairs of the operands' type; values of 16 bits have that type.
template <bool BF16, int K, typename V>
__device__ __forceinline__ void load_run(u32* to, const V* from) {
  if constexpr (sizeof(V) == 4) {
#pragma unroll
    for (int i = 0; i + 4 <= K; i += 4) {
      const float4 v = *(const float4*)(from + i);
      to[i / 2] = pack<BF16>(v.x, v.y), to[i / 2 + 1] = pack<BF16>(v.z, v.w);
    }
    if constexpr (K == 2) to[0] = pack<BF16>(from[0], from[1]);
  } else if constexpr (K % 8 == 0) {
#pragma unroll
    for (int i = 0; i < K; i += 8) {
      const uint4 v = *(const uint4*)(from + i);
      to[i / 2] = v.x, to[i / 2 + 1] = v.y, to[i / 2 + 2] = v.z, to[i / 2 + 3] = v.w;
    }
  } else if constexpr (K == 4) {
    const uint2 v = *(const uint2*)from;
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *(const u32*)from;
  }
}

// Four neighbouring labels, of which `real` exist. EVEN: they are there together, and aligned to 8 bytes.
template <bool EVEN>
__device__ __forceinline__ uint2 load_four(const unsigned short* from, i64 real) {
  if constexpr (EVEN) return *(const uint2*)from;
  const u32 a = real > 0 ? from[0] : 0, b = real > 1 ? from[1] : 0, c = real > 2 ? from[2] : 0, d = real > 3 ? from[3] : 0;
  return make_uint2(a | b << 16, c | d << 16);
}

template <bool EVEN>
__device__ __forceinline__ void store_four(unsigned short* to, u32 low, u32 high, i64 real) {
  if constexpr (EVEN) {
    if (real > 0) asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(low), "r"(high) : "memory");
  } else {
    if (real > 0) to[0] = low;
    if (real > 1) to[1] = low >> 16;
    if (real > 2) to[2] = high;
    if (real > 3) to[3] = high >> 16;
  }
}

// ---- dx

// Labels of a tile of 16: place 2 q + e of the inner axis is label 4 q + e, place 8 + 2 q + e is 4 q + 2 + e.
// Features: rows r and r + 8 of tile i are features F/8 r + 2 i and the next. Batch rows of a part: column c of tile (h, k) is
// 16 h + 4 (c/2) + 2 k + c%2.
template <bool BF16, typename V, int D, int F, int G, int P, int WARPS, bool EVEN>
__global__ void __launch_bounds__(WARPS * 32, 1) slab_grad_x(
    const unsigned short* dz,  // (N, L), in
    const V* weight,  // (T, G, F), in
    const short* index,  // (T, F), in
    float* parts,  // (ranges, D, NP), out: NP is 32 P slabs
    int n, int groups, int padding /* T G - L */, int slabs, int ranges) {
  constexpr int TILES = F < 64 ? F / 16 : 4, SECTIONS = F / (16 * TILES);
  extern __shared__ __align__(128) unsigned char slab[];
  __shared__ u64 turns[P * WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
  const int first_batch = blockIdx.x % slabs * 32 * P, range = blockIdx.x / slabs;
  const int first = (i64)groups * range / ranges, end = (i64)groups * (range + 1) / ranges;
  const i64 rows = (i64)groups * G - padding;
  const u32 base = shared_address(slab);
  start_turns<WARPS>(turns, P);
  for (int i = threadIdx.x; i < P * D * 8; i += WARPS * 32) store_shared(base + i * 16, make_uint4(0, 0, 0, 0));
  __syncthreads();
  open_turns<WARPS>(turns, P);
  u32 phase = 0, words[F / 16];
  auto fetch = [&](int group) { load_run<BF16, F / 8>(words, (const unsigned short*)index + (i64)group * F + F / 8 * r); };
  auto load_weights = [&](u32 (&to)[4][TILES], int group, int block, int section) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
      const i64 label = (i64)group * G + 16 * block + 4 * q + g;
      load_run<BF16, 2 * TILES>(to[g], weight + label * F + F / 8 * r + 2 * TILES * section);
      if (label >= rows)  // padding may hold anything
#pragma unroll
        for (int i = 0; i < TILES; i++) to[g][i] = 0;
    }
  };
  auto load_logits = [&](u32 (&to)[2][2][2], int group, int block, int part) {
    const i64 label = (i64)group * G + 16 * block + 4 * q;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int batch = first_batch + 32 * part + 16 * h + 4 * (r / 2) + 2 * k + r % 2;
        uint2 v = make_uint2(0, 0);
        if (batch < n && label < rows) v = load_four<EVEN>(dz + batch * rows + label, rows - label);
        to[h][k][0] = v.x, to[h][k][1] = v.y;
      }
  };
  // A warp that is late keeps all others waiting, so the next group's weights are under way while it waits itself. More would not fit
  // the registers.
  constexpr bool AHEAD = G == 16 && SECTIONS == 1;
  u32 next_run[4][TILES];
  if (first + warp < end) {
    fetch(first + warp);
    if (AHEAD) load_weights(next_run, first + warp, 0, 0);
  }
  for (int start = first; start < end; start += WARPS) {
    const int group = start + warp;
    const bool mine = group < end;
    u32 near_at[F / 8], far_at[F / 8];  // of the part at hand
    if (mine) {
#pragma unroll
      for (int i = 0; i < F / 8; i++) {
        near_at[i] = base + (words[i / 2] >> 16 * (i % 2) & 0xffff) * 128 + (q + r % 2 * 4) * 16;
        far_at[i] = near_at[i] ^ 64;
      }
      if (group + WARPS < end) fetch(group + WARPS);
      if (group + 2 * WARPS < end) {
        for (int b = lane; b < 32 * P; b += 32)
          if (first_batch + b < n) {
#pragma unroll
            for (i64 label = (i64)(group + 2 * WARPS) * G, g = 0; g < G; g += 16)
              if (label + g < rows) prefetch(dz + (first_batch + b) * rows + label + g);
          }
        if (G == 16)  // more weights would be in the way
          for (int line = lane; line < G * F * (int)sizeof(V) / 128; line += 32)
            prefetch((const char*)(weight + (i64)(group + 2 * WARPS) * G * F) + 128 * line);
      }
    }
#pragma unroll
    for (int section = 0; section < SECTIONS; section++) {
#pragma unroll 1  // so that no other part's work is done within a turn
      for (int part = 0; part < P; part++) {
        // Even rows of `near` are of the part's first 16 batch rows and odd ones of the others, so that neighbouring rows use other
        // banks of the shared memory; those of `far` the other way round.
        float near[TILES][2][4] = {}, far[TILES][2][4] = {};
        if (mine) {
#pragma unroll
          for (int block = 0; block < G / 16; block++) {
            u32 run[4][TILES], d[2][2][2];
            load_logits(d, group, block, part);
            if (AHEAD) {
#pragma unroll
              for (int i = 0; i < 4 * TILES; i++) run[i / TILES][i % TILES] = next_run[i / TILES][i % TILES];
            } else {
              load_weights(run, group, block, section);
            }
#pragma unroll
            for (int i = 0; i < TILES; i++) {
              const u32 a[4] = {__byte_perm(run[0][i], run[1][i], 0x5410), __byte_perm(run[0][i], run[1][i], 0x7632),
                                __byte_perm(run[2][i], run[3][i], 0x5410), __byte_perm(run[2][i], run[3][i], 0x7632)};
              u32 even[4], odd[4];
#pragma unroll
              for (int j = 0; j < 4; j++) even[j] = r % 2 ? 0 : a[j], odd[j] = r % 2 ? a[j] : 0;
#pragma unroll
              for (int k = 0; k < 2; k++) {
                multiply_add<BF16>(near[i][k], even, d[0][k][0], d[0][k][1]);
                multiply_add<BF16>(far[i][k], even, d[1][k][0], d[1][k][1]);
                multiply_add<BF16>(near[i][k], odd, d[1][k][0], d[1][k][1]);
                multiply_add<BF16>(far[i][k], odd, d[0][k][0], d[0][k][1]);
              }
            }
          }
        }
        if (AHEAD && part + 1 == P && group + WARPS < end) load_weights(next_run, group + WARPS, 0, 0);
        await_turn(turns + part * WARPS + warp, phase);
        if (mine) {
          uint4 old[TILES][2][2];
#pragma unroll
          for (int i = 0; i < 2 * TILES; i++) {
            old[i / 2][i % 2][0] = load_shared(near_at[2 * TILES * section + i]);
            old[i / 2][i % 2][1] = load_shared(far_at[2 * TILES * section + i]);
          }
#pragma unroll
          for (int i = 0; i < 2 * TILES; i++) {
#pragma unroll
            for (int other = 0; other < 2; other++) {
              const auto& c = other ? far[i / 2] : near[i / 2];
              uint4 v = old[i / 2][i % 2][other];
              const int e = i % 2 * 2;
              v.x = __float_as_uint(__uint_as_float(v.x) + c[0][e]), v.y = __float_as_uint(__uint_as_float(v.y) + c[0][e + 1]);
              v.z = __float_as_uint(__uint_as_float(v.z) + c[1][e]), v.w = __float_as_uint(__uint_as_float(v.w) + c[1][e + 1]);
              store_shared((other ? far_at : near_at)[2 * TILES * section + i], v);
            }
          }
        }
        pass_turn(turns + part * WARPS + (warp + 1) % WARPS);
#pragma unroll
        for (int i = 2 * TILES * section; i < 2 * TILES * (section + 1); i++) near_at[i] += D * 128, far_at[i] += D * 128;
      }
      phase ^= 1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < P * D * 8; i += WARPS * 32) {
    const int part = i / (D * 8), d = i / 8 % D;
    *(uint4*)(parts + ((i64)range * D + d) * (32 * P * slabs) + first_batch + 32 * part + i % 8 * 4) = load_shared(base + i * 16);
  }
}

// ---- z

// A warp takes units of U labels of a group. Labels of a tile of 8: column c of tile m is U/4 (c/2) + 2 m + c%2. Features, in runs of R:
// place r of block j is 4 R (2 j / R) + R (r/2) + 2 j % R + r%2. Batch rows of a part: place c of block j is 8 (c/2) + 2 j + c%2.
template <bool BF16, typename V, int D, int F, int G, int P, int WARPS, bool EVEN>
__global__ void __launch_bounds__(WARPS * 32, 1) slab_forward(
    const unsigned short* x,  // (D, NP), in: x transposed, NP is 32 P slabs
    const V* weight,  // (T, G, F), in
    const short* index,  // (T, F), in
    const float* bias,  // (L,) or null, in
    unsigned short* out,  // (N, L), out
    int n, int groups, int padding /* T G - L */, int slabs, int ranges) {
  constexpr int U = G % 32 ? 16 : 32, TILES = F / 16, R = F % 32 ? 4 : 8;
  extern __shared__ __align__(128) unsigned char slab[];
  __shared__ uint4 eye[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
  const int first_batch = blockIdx.x % slabs * 32 * P, range = blockIdx.x / slabs;
  const int units = groups * (G / U), first = (i64)units * range / ranges, end = (i64)units * (range + 1) / ranges;
  const i64 rows = (i64)groups * G - padding;
  const u32 base = shared_address(slab);
  for (int i = threadIdx.x; i < P * D * 4; i += WARPS * 32) {
    const int part = i / (D * 4), d = i / 4 % D;
    store_shared(base + i * 16, *(const uint4*)(x + (i64)d * (32 * P * slabs) + first_batch + 32 * part + i % 4 * 8));
  }
  // A product with the unit matrix transposes: what it is made of must come from memory, or the compiler makes it anew each time.
  if (warp == 0) {
    const u32 one = BF16 ? 0x3f80 : 0x3c00, corner = (r == 2 * q ? one : 0) | (r == 2 * q + 1 ? one << 16 : 0);
    eye[lane] = make_uint4(corner, 0, 0, corner);
  }
  __syncthreads();
  const uint4 loaded = load_shared(shared_address(eye + lane));
  const u32 identity[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  u32 words[F / 8], next_w[U / 8][F / 8];
  float next_b[U / 4] = {};
  auto fetch_words = [&](int unit) {
#pragma unroll
    for (int c = 0; c < F / 4 / R; c++)
      load_run<BF16, R>(words + c * R / 2, (const unsigned short*)index + (i64)(unit / (G / U)) * F + 4 * R * c + R * (r / 2));
  };
  auto fetch = [&](int unit) {
#pragma unroll
    for (int m = 0; m < U / 8; m++)
#pragma unroll
      for (int c = 0; c < F / 4 / R; c++)
        load_run<BF16, R>(next_w[m] + c * R / 2, weight + ((i64)unit * U + U / 4 * (r / 2) + 2 * m + r % 2) * F + 4 * R * c + R * q);
    if (bias) {
#pragma unroll
      for (int e = 0; e < U / 4; e += 4) {
        const i64 label = (i64)unit * U + U / 4 * q + e;
        if (label + 4 <= rows) {
          const float4 v = *(const float4*)(bias + label);
          next_b[e] = v.x, next_b[e + 1] = v.y, next_b[e + 2] = v.z, next_b[e + 3] = v.w;
        } else {
          for (int i = 0; i < 3; i++)
            if (label + i < rows) next_b[e + i] = bias[label + i];
        }
      }
    }
  };
  constexpr bool EARLY = U * F <= 1024;  // what is loaded a unit ahead must fit the registers
  if (first + warp < end) {
    fetch_words(first + warp);
    if (EARLY) fetch(first + warp);
  }
  for (int unit = first + warp; unit < end; unit += WARPS) {
    u32 place[F / 8];
#pragma unroll
    for (int j = 0; j < F / 8; j++) place[j] = base + (words[j] >> 16 * (r % 2) & 0xffff) * 64 + q * 16;
    if (!EARLY) fetch(unit);
    float b[U / 4];
#pragma unroll
    for (int i = 0; i < U / 4; i++) b[i] = next_b[i];
    u32 w[U / 8][F / 8];
#pragma unroll
    for (int i = 0; i < U * F / 64; i++) w[i / (F / 8)][i % (F / 8)] = next_w[i / (F / 8)][i % (F / 8)];
    if (unit + WARPS < end) {
      fetch_words(unit + WARPS);
      if (EARLY) fetch(unit + WARPS);
    }
    if (unit + 2 * WARPS < end)
      for (int line = lane; line < U * F * (int)sizeof(*weight) / 128; line += 32)
        prefetch((const char*)(weight + (i64)(unit + 2 * WARPS) * U * F) + 128 * line);
#pragma unroll 1
    for (int part = 0; part < P; part++) {
      u32 a[2][TILES][4];
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const uint4 runs[2] = {load_shared(place[2 * i] + part * D * 64), load_shared(place[2 * i + 1] + part * D * 64)};
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float c[4] = {};
            multiply_add<BF16>(c, identity, k ? runs[j].z : runs[j].x, k ? runs[j].w : runs[j].y);
            a[k][i][2 * j] = pack<BF16>(c[0], c[1]), a[k][i][2 * j + 1] = pack<BF16>(c[2], c[3]);
          }
      }
      float z[2][U / 8][4];
#pragma unroll
      for (int i = 0; i < U; i++) z[i / (U / 2)][i / 4 % (U / 8)][i % 4] = b[i / 4 % (U / 8) * 2 + i % 2];
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
          for (int m = 0; m < U / 8; m++) multiply_add<BF16>(z[k][m], a[k][i], w[m][2 * i], w[m][2 * i + 1]);
      const i64 label = (i64)unit * U + U / 4 * q;
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int batch = first_batch + 32 * part + 8 * (r / 2) + 2 * (2 * k + j) + r % 2;
          if (batch >= n) continue;
          unsigned short* to = out + batch * rows + label;
#pragma unroll
          for (int m = 0; m < U / 8; m += 2)
            store_four<EVEN>(to + 2 * m, pack<BF16>(z[k][m][2 * j], z[k][m][2 * j + 1]),
                             pack<BF16>(z[k][m + 1][2 * j], z[k][m + 1][2 * j + 1]), rows - label - 2 * m);
        }
    }
  }
}

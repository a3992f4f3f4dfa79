// What kernels on slabs in shared memory have in common (slab_linear.cu, slab_tail.cu).
//
// A slab is parts of 32 batch rows: [part][feature][32 rows]. Tiles are numbered as tensor cores hold them (m16n8k16: a lane is 4 r + q):
// which batch row, feature or label stands at which place is free as long as operands and results agree, so that memory is read and
// written in runs and no value is exchanged between threads.

typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  u32 address;
  asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(pointer));
  return address;
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%4], {%0, %1, %2, %3};" ::"r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(address) : "memory");
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

__device__ __forceinline__ void prefetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// Words that other programs write meanwhile: past the first-level cache, each whole.
__device__ __forceinline__ u32 load_word(const u32* from) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_word(u32* to, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void load_parts(u64 (&v)[2], const u64* from) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v[0]), "=l"(v[1]) : "l"(from) : "memory");
}

__device__ __forceinline__ void store_parts(u64* to, u64 v, u64 w) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(v), "l"(w) : "memory");
}

__device__ __forceinline__ u32 add(u32 a, u32 b) {  // of two float16
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

template <bool BF16>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

template <bool BF16>
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 v;
  if constexpr (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// ---- Turns: warp by warp, round by round

template <int WARPS>
__device__ __forceinline__ void start_turns(u64* turns, int parts) {  // before a __syncthreads
  for (int i = threadIdx.x; i < parts * WARPS; i += blockDim.x)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(shared_address(turns + i)) : "memory");
}

__device__ __forceinline__ void arrive(u64* turn) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" ::"r"(shared_address(turn)) : "memory");
}

template <int WARPS>
__device__ __forceinline__ void open_turns(u64* turns, int parts) {  // after it: the first warp's
  if (threadIdx.x < 32 * parts) arrive(turns + threadIdx.x / 32 * WARPS);
}

__device__ __forceinline__ void await_turn(u64* turn, u32 phase) {
  u32 done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(shared_address(turn)), "r"(phase) : "memory");
}

// All lanes arrive: one for its warp would do, but compute-sanitizer's racecheck does not follow that. Told that the warp is together
// again, the compiler keeps what is the same for all lanes out of their registers, of which there are none to spare.
__device__ __forceinline__ void pass_turn(u64* turn) {
  __syncwarp();
  arrive(turn);
}

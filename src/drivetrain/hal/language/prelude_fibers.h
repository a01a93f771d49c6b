/* Threads of a block with a stack each, switched by hand: for kernels that wait where it is not
   known before who gets there. Code 3 comes back when threads wait for others that never come. */
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif
struct dt_fiber {
#if defined(__x86_64__) || defined(__aarch64__)
  void *stack_pointer;
#else
  ucontext_t context;
#endif
  int state; /* 0 runs, 1 waits for the block, 2 for lanes of its warp, 3 ended */
  uint mask, place; /* which lanes, and which barrier it waits for */
  ulong given;
};
struct dt_fibers {
  dt_fiber main, *all;
  uint count, current;
  void (*body)(const dt_block *, uint, uint, uint, void **);
  const dt_block *block;
  void **arguments;
  char *stacks;
  size_t stack_bytes;
};
static thread_local dt_fibers *dt_now;
#if defined(__x86_64__)
extern "C" void dt_switch(void **save, void *load) __asm__("dt_switch_@UNIT@");
__asm__(
    ".text\n.p2align 4\n.local dt_switch_@UNIT@\n.type dt_switch_@UNIT@,@function\n"
    "dt_switch_@UNIT@:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size dt_switch_@UNIT@,.-dt_switch_@UNIT@\n");
#elif defined(__aarch64__)
extern "C" void dt_switch(void **save, void *load) __asm__("dt_switch_@UNIT@");
__asm__(
    ".text\n.p2align 4\n.local dt_switch_@UNIT@\n.type dt_switch_@UNIT@,%function\n"
    "dt_switch_@UNIT@:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\n"
    "stp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
    "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
    "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
    "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\nadd sp,sp,#160\nret\n"
    ".size dt_switch_@UNIT@,.-dt_switch_@UNIT@\n");
#endif
static inline void dt_to(dt_fiber &from, dt_fiber &to) {
#if defined(__x86_64__) || defined(__aarch64__)
  dt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}
__attribute__((noinline)) static void dt_yield(dt_fibers *f) { dt_to(f->all[f->current], f->main); }
__attribute__((noinline)) static void dt_entry() {
  dt_fibers *f = dt_now;
  const uint t = f->current, nx = f->block->block[0], ny = f->block->block[1];
  f->body(f->block, t % nx, t / nx % ny, t / nx / ny, f->arguments);
  f->all[t].state = 3;
  dt_yield(f);
  __builtin_trap();
}
static void dt_prepare(dt_fibers *f, uint t) {
  dt_fiber &fiber = f->all[t];
  char *low = f->stacks + f->stack_bytes * t;
#if defined(__x86_64__)
  void **top = (void **)((uintptr_t)(low + f->stack_bytes) & ~(uintptr_t)15);
  *--top = 0;
  *--top = (void *)dt_entry;
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.stack_pointer = top;
#elif defined(__aarch64__)
  char *top = (char *)((uintptr_t)(low + f->stack_bytes) & ~(uintptr_t)15) - 160;
  memset(top, 0, 160);
  *(void **)(top + 88) = (void *)dt_entry;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = low;
  fiber.context.uc_stack.ss_size = f->stack_bytes;
  fiber.context.uc_link = 0;
  makecontext(&fiber.context, dt_entry, 0);
#endif
  fiber.state = 0;
  fiber.mask = fiber.place = 0;
  fiber.given = 0;
}
static void dt_wake(dt_fibers *f) {
  /* The block: every thread waits, and at the same place. */
  uint waiting = 0;
  for (uint t = 0; t < f->count; t++) waiting += f->all[t].state == 1 && f->all[t].place == f->all[0].place;
  if (waiting == f->count)
    for (uint t = 0; t < f->count; t++) f->all[t].state = 0;
  /* A warp: all lanes of the mask that are there wait with the same mask at the same exchange. */
  for (uint first = 0; first < f->count; first += 32) {
    for (uint lane = 0; lane < 32 && first + lane < f->count; lane++) {
      dt_fiber &me = f->all[first + lane];
      if (me.state != 2) continue;
      bool all = true;
      for (uint other = 0; other < 32 && first + other < f->count && all; other++) {
        const dt_fiber &you = f->all[first + other];
        if ((me.mask >> other & 1u) && you.state != 3)
          all = you.state == 2 && you.mask == me.mask;
      }
      if (!all) continue;
      const uint mask = me.mask;
      for (uint other = 0; other < 32 && first + other < f->count; other++)
        if ((mask >> other & 1u) && f->all[first + other].state == 2) f->all[first + other].state = 0;
    }
  }
}
typedef void dt_fiber_body(const dt_block *, uint, uint, uint, void **);
static int dt_run_fibers(dt_fibers *f, dt_fiber_body *body, const dt_block *block, void **arguments) {
  f->body = body;
  f->block = block;
  f->arguments = arguments;
  dt_fibers *outer = dt_now;
  dt_now = f;
  for (uint t = 0; t < f->count; t++) dt_prepare(f, t);
  int code = 0;
  for (;;) {
    uint ran = 0, ended = 0;
    for (uint t = 0; t < f->count; t++) {
      if (f->all[t].state == 0) {
        f->current = t;
        dt_to(f->main, f->all[t]);
        ran++;
      }
      ended += f->all[t].state == 3;
    }
    if (ended == f->count) break;
    if (!ran) { code = 3; break; }
    dt_wake(f);
  }
  dt_now = outer;
  return code;
}
static inline void dt_sync_block(const dt_block &b, uint place) {
  b.fibers->all[b.fibers->current].state = 1;
  b.fibers->all[b.fibers->current].place = place;
  dt_yield(b.fibers);
}
static inline void dt_sync_lanes(const dt_block &b, uint mask) {
  dt_fiber &me = b.fibers->all[b.fibers->current];
  me.mask = mask | 1u << (b.fibers->current & 31u);
  me.state = 2;
  dt_yield(b.fibers);
}
template <class T> static inline T dt_exchange(const dt_block &b, uint mask, T value, int lane_from(int, int, int), int by, int width) {
  dt_fibers *f = b.fibers;
  const uint t = f->current;
  ulong bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  f->all[t].given = bits;
  dt_sync_lanes(b, mask);
  const uint other = (t & ~31u) | (uint)lane_from((int)(t & 31u), by, width);
  if (other < f->count) bits = f->all[other].given;
  /* Nobody gives the next value before all have read this one. */
  dt_sync_lanes(b, mask);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
#define DT_SHFL(KIND) \
  template <class T> static inline T dt_shfl_##KIND(const dt_block &b, uint mask, T value, int by, int width) { \
    return dt_exchange(b, mask, value, dt_source_##KIND, by, width); \
  }
DT_SHFL(idx) DT_SHFL(up) DT_SHFL(down) DT_SHFL(xor)
static inline uint dt_vote_ballot(const dt_block &b, uint mask, bool vote) {
  dt_fibers *f = b.fibers;
  const uint t = f->current, first = t & ~31u;
  f->all[t].given = vote;
  dt_sync_lanes(b, mask);
  uint out = 0;
  for (uint lane = 0; lane < 32 && first + lane < f->count; lane++)
    if ((mask >> lane & 1u) && f->all[first + lane].state != 3) out |= (uint)(f->all[first + lane].given & 1) << lane;
  dt_sync_lanes(b, mask);
  return out;
}
static inline int dt_vote_any(const dt_block &b, uint mask, bool vote) { return dt_vote_ballot(b, mask, vote) != 0; }
static inline int dt_vote_all(const dt_block &b, uint mask, bool vote) { return dt_vote_ballot(b, mask, !vote) == 0; }
/* The stacks of one call: kept for all its blocks. */
struct dt_stacks {
  dt_fibers fibers;
  dt_stacks(const dt_cpu_range *range, size_t stack_bytes) {
    const uint count = range->block[0] * range->block[1] * range->block[2];
    memset((void *)&fibers, 0, sizeof fibers);
    fibers.count = count;
    fibers.stack_bytes = stack_bytes;
    fibers.stacks = (char *)malloc(stack_bytes * count);
    fibers.all = (dt_fiber *)calloc(count, sizeof(dt_fiber));
  }
  ~dt_stacks() { free(fibers.stacks); free(fibers.all); }
  bool ok() const { return fibers.stacks && fibers.all; }
};

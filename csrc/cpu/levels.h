// Compiles the file ARMOR_LOOPS once per instruction set worth having, each time in a namespace of its own: `baseline`,
// and under GCC on x86 `avx2` and `avx512`. No include guard and no includes: a kernel file includes this once, inside
// its namespace, after everything that ARMOR_LOOPS needs, because functions are compiled for the instruction set of
// the place where their text stands.
//
// ARMOR_BEST(Table, Loops) is then Table::of<level::Loops>() for the widest level that this processor runs.

#define ARMOR_INLINE inline __attribute__((always_inline))
#define ARMOR_INLINE_LAMBDA __attribute__((always_inline))

namespace baseline {
#include ARMOR_LOOPS
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include ARMOR_LOOPS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#include ARMOR_LOOPS
}  // namespace avx512
#pragma GCC pop_options

inline bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && runs_avx2();
}
#define ARMOR_BEST(Table, ...)                                             \
  (runs_avx512() ? Table::template of<avx512::__VA_ARGS__>()               \
                 : runs_avx2() ? Table::template of<avx2::__VA_ARGS__>()   \
                               : Table::template of<baseline::__VA_ARGS__>())

#else
#define ARMOR_BEST(Table, ...) (Table::template of<baseline::__VA_ARGS__>())
#endif

// Target regions: one translation unit contains code for an instruction set that the rest of the library is not built
// for. Two compilers have two spellings; one pair of macros covers both. Rules (each was a bug somewhere):
// - include every header first, open the region last: a header's inline function compiled inside the region may be
//   the copy the linker keeps, and then runs on CPUs without the instruction set;
// - for the same reason: a namespace per instruction set around the .inc files, and no std:: templates inside;
// - no global vector constants (they are initialised at import, on every CPU).
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TQ_X86 1
#endif

#define TQ_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TQ_TARGET_BEGIN(features) \
  TQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TQ_TARGET_END TQ_PRAGMA(clang attribute pop)
#define TQ_UNROLL TQ_PRAGMA(unroll)
#elif defined(__GNUC__)
#define TQ_TARGET_BEGIN(features) TQ_PRAGMA(GCC push_options) TQ_PRAGMA(GCC target(features))
#define TQ_TARGET_END TQ_PRAGMA(GCC pop_options)
#define TQ_UNROLL TQ_PRAGMA(GCC unroll 64)
#else
#define TQ_UNROLL
#endif

#if defined(__GNUC__) || defined(__clang__)
#define TQ_INLINE static inline __attribute__((always_inline))
#define TQ_INLINE_LAMBDA __attribute__((always_inline))  // behind the parameters
#else
#define TQ_INLINE static inline
#define TQ_INLINE_LAMBDA
#endif

// Sixteen floats at a time, on every instruction set. Included inside the namespace of one.
//
// `F` holds 16 floats, `W` 16 words of 32 bits. A word is what one step of a dot product multiplies: one float,
// or a pair of bf16 where the machine multiplies pairs (kPairs). Rows x columns of a register block are
// kBlockRows x kBlockCols; they never change a row's result, only how many rows share a load.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "args.hpp"

namespace dormouse::DORMOUSE_ISA {

// Own min and max: std's are inline templates that the linker may take from the widest build.
inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }
inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bf16(uint16_t x) { return bits_float(uint32_t(x) << 16); }

// Round to nearest even. Denormals stay, unlike in the vector instruction: quantization must give exact bits.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace dormouse::DORMOUSE_ISA

#if defined(__AVX512F__)
#include "simd_avx512.hpp"
#else
#include "simd_parts.hpp"
#endif

namespace dormouse::DORMOUSE_ISA {

#ifndef __AVX512BF16__
// Named by branches that kPairs closes; never called.
F dot_pairs(F, W, W);
W pair_neighbours(F, F);
W pair_lanes(F, F);
#endif

// 2^x for x up to 127; exactly 1 at 0 and exactly 0 below -150, so that a masked key adds nothing. NaN stays NaN.
// `Exact`: to 1e-7; otherwise to 3e-6, for weights that are rounded to bf16.
template <bool Exact>
inline F exp2(F x) {
    const F bounded = max(set(-200.0f), x);
    const F n = round_even(bounded);
    const F f = sub(bounded, n);
    F p;
    if constexpr (Exact) {
        p = fma(set(1.326472725e-3f), f, set(9.671512688e-3f));
        p = fma(p, f, set(5.550733744e-2f));
        p = fma(p, f, set(2.402224208e-1f));
        p = fma(p, f, set(6.931469776e-1f));
    } else {
        p = fma(set(9.582853169e-3f), f, set(5.590642504e-2f));
        p = fma(p, f, set(2.402409861e-1f));
        p = fma(p, f, set(6.931241934e-1f));
    }
    return scale_by_power(fma(p, f, set(1.0f)), n);
}

inline float exp2(float x) { return first(exp2<true>(set(x))); }

}  // namespace dormouse::DORMOUSE_ISA

// `F` and `W` as arrays of the machine's own vectors: two of AVX2, four of NEON or SSE.
//
// The compiler's vector types do the arithmetic; intrinsics stand only where it has no operator.
#pragma once

namespace dormouse::DORMOUSE_ISA {

#ifdef __AVX2__
constexpr int kWidth = 8;
constexpr int kBlockRows = 6;
#elif defined(__ARM_NEON)
constexpr int kWidth = 4;
constexpr int kBlockRows = 6;
#else
constexpr int kWidth = 4;
constexpr int kBlockRows = 2;
#endif
constexpr int kBlockCols = 1;
constexpr bool kPairs = false;
constexpr int kParts = kLanes / kWidth;

typedef float PartF __attribute__((vector_size(4 * kWidth)));
typedef int32_t PartI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t PartW __attribute__((vector_size(4 * kWidth)));

struct F {
    PartF part[kParts];
};
struct W {
    PartW part[kParts];
};

template <class Op>
inline F each(Op op) {
    F out;
    for (int i = 0; i < kParts; ++i) out.part[i] = op(i);
    return out;
}

inline PartF fma_part(PartF a, PartF b, PartF c) {
#ifdef __FMA__
    return (PartF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (PartF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline F set(float x) {
    return each([&](int) { return x - PartF{}; });
}
inline F zero() { return {}; }
inline F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
inline W set_word(uint32_t x) {
    W out;
    for (int i = 0; i < kParts; ++i) out.part[i] = x | PartW{};
    return out;
}
inline W zero_words() { return {}; }
inline W load_words(const uint32_t* p) {
    W x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store_words(uint32_t* p, W x) { std::memcpy(p, &x, sizeof x); }
inline F as_floats(W x) {
    return each([&](int i) { return (PartF)x.part[i]; });
}
inline W as_words(F x) {
    W out;
    for (int i = 0; i < kParts; ++i) out.part[i] = (PartW)x.part[i];
    return out;
}
inline float first(F x) { return x.part[0][0]; }

inline F add(F a, F b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
}
inline F sub(F a, F b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
}
inline F mul(F a, F b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
}
inline F div(F a, F b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
}
inline F fma(F a, F b, F c) {
    return each([&](int i) { return fma_part(a.part[i], b.part[i], c.part[i]); });
}
// Of a NaN and a number these return the second argument, as x86's instruction does.
inline F max(F a, F b) {
    return each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}
inline F min(F a, F b) {
    return each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}
// Adding and subtracting 1.5 * 2^23 leaves the nearest whole number, for |x| < 2^22.
inline F round_even(F x) {
    return each([&](int i) { return (x.part[i] + 12582912.0f) - 12582912.0f; });
}
// x * 2^n for whole n from -200 to 127; x is about 1. Below 2^-126 it is zero.
inline F scale_by_power(F x, F n) {
    return each([&](int i) {
        const PartF power = (PartF)((__builtin_convertvector(n.part[i], PartI) + 127) << 23);
        return n.part[i] < -126.0f ? PartF{} : x.part[i] * power;
    });
}
inline F keep(F x, int begin, int end, float fill) {
    alignas(64) float lane[kLanes];
    store(lane, x);
    for (int i = 0; i < kLanes; ++i) lane[i] = i >= begin && i < end ? lane[i] : fill;
    return load(lane);
}
// Also where one is NaN.
inline bool any_greater(F a, F b) {
    PartI found{};
    for (int i = 0; i < kParts; ++i) found |= ~(a.part[i] <= b.part[i]);
    int any = 0;
    for (int i = 0; i < kWidth; ++i) any |= found[i];
    return any != 0;
}

// Halves are folded in one fixed order, the order of AVX-512's reduction.
template <class Op>
inline float fold(F x, Op op) {
    alignas(64) float lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] = op(lane[i], lane[i + half]);
    }
    return lane[0];
}
inline float reduce_max(F x) {
    return fold(x, [](float a, float b) { return a > b ? a : b; });
}
inline float reduce_min(F x) {
    return fold(x, [](float a, float b) { return a < b ? a : b; });
}
inline float reduce_add(F x) {
    return fold(x, [](float a, float b) { return a + b; });
}

inline F load_bf16(const uint16_t* p) {
    W out;
    uint32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(p[i]) << 16;
    std::memcpy(&out, lane, sizeof out);
    return as_floats(out);
}
inline F load_u8(const uint8_t* p) {
#ifdef __AVX2__
    F out;
    for (int i = 0; i < kParts; ++i) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
        out.part[i] = (PartF)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    }
    return out;
#else
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = float(p[i]);
    return load(lane);
#endif
}
// 32 unsigned numbers, the low nibble of a byte before the high one.
template <int Bits>
inline void load_packed(const uint8_t* p, F out[2]) {
    uint8_t bytes[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
        bytes[2 * i] = Bits == 8 ? p[2 * i] : p[i] & 15;
        bytes[2 * i + 1] = Bits == 8 ? p[2 * i + 1] : p[i] >> 4;
    }
    out[0] = load_u8(bytes);
    out[1] = load_u8(bytes + kLanes);
}
inline void store_u8(uint8_t* p, F x) {
    float lane[kLanes];
    store(lane, x);
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(int32_t(lane[i]));
}
inline F set_bf16(const uint16_t* p) { return set(from_bf16(*p)); }

inline F round_bf16(F x) {
    F out;
    for (int i = 0; i < kParts; ++i) {
        const PartW bits = (PartW)x.part[i];
        const PartW sum = bits + 0x7fffu + (bits >> 16 & 1u);
        const PartW rounded = (x.part[i] == x.part[i]) ? sum : (bits | 0x400000u);
        out.part[i] = (PartF)(rounded & 0xffff0000u);
    }
    return out;
}
inline void store_bf16(uint16_t* p, F x) {
    uint32_t lane[kLanes];
    store_words(lane, as_words(round_bf16(x)));
    for (int i = 0; i < kLanes; ++i) p[i] = uint16_t(lane[i] >> 16);
}

inline void transpose(W r[16]) {
    uint32_t in[16][kLanes], out[16][kLanes];
    for (int i = 0; i < 16; ++i) store_words(in[i], r[i]);
    for (int w = 0; w < 16; ++w) {
        for (int i = 0; i < 16; ++i) out[w][i] = in[i][w];
    }
    for (int i = 0; i < 16; ++i) r[i] = load_words(out[i]);
}
// Each word of `sum` plus the four products of its bytes: unsigned ones of `u`, signed ones of `s`.
inline PartI dot_part(PartI sum, PartW u, PartI s) {
#ifdef __AVX2__
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)u, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16((__m256i)s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)u, 8), _mm256_srai_epi16((__m256i)s, 8));
    return (PartI)_mm256_add_epi32((__m256i)sum, _mm256_add_epi32(even, odd));
#else
    for (int byte = 0; byte < 4; ++byte) sum += (PartI)(u >> (8 * byte) & 255u) * (s << (24 - 8 * byte) >> 24);
    return sum;
#endif
}
inline W dot_bytes(W sum, W u, W s) {
    W out;
    for (int i = 0; i < kParts; ++i) out.part[i] = (PartW)dot_part((PartI)sum.part[i], u.part[i], (PartI)s.part[i]);
    return out;
}
inline F whole_floats(W x) {
    return each([&](int i) { return __builtin_convertvector((PartI)x.part[i], PartF); });
}
// To the nearest whole number, ties to even.
inline W whole(F x) {
    const F rounded = round_even(x);
    W out;
    for (int i = 0; i < kParts; ++i) out.part[i] = (PartW)__builtin_convertvector(rounded.part[i], PartI);
    return out;
}
inline void store_bytes(int8_t* p, W x) {
    uint32_t lane[kLanes];
    store_words(lane, x);
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(lane[i]);
}
inline int sum_of(W x) {
    uint32_t lane[kLanes], sum = 0;
    store_words(lane, x);
    for (uint32_t value : lane) sum += value;
    return int(sum);
}
// The low or the high nibble of each byte.
inline W nibbles(W x, bool high) {
    W out;
    for (int i = 0; i < kParts; ++i) out.part[i] = (high ? x.part[i] >> 4 : x.part[i]) & 0x0f0f0f0fu;
    return out;
}
// Finite halves: shifted into place, their exponent is 112 too small.
inline F load_f16(const uint16_t* p) {
    uint32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(p[i] & 0x8000) << 16 | uint32_t(p[i] & 0x7fff) << 13;
    return mul(as_floats(load_words(lane)), set(5.192296858534828e33f));
}

// The first `count` words, zeros in the other lanes; nothing behind them is read.
inline W load_some(const uint32_t* p, int count) {
    uint32_t lane[kLanes] = {};
    std::memcpy(lane, p, sizeof(uint32_t) * size_t(least(count, kLanes)));
    return load_words(lane);
}
// Bits [shift, shift + Bits) of each word, as a float.
template <int Bits>
inline F field(W x, int shift) {
    return each([&](int i) {
        return __builtin_convertvector((PartI)(x.part[i] >> shift & ((1u << Bits) - 1)), PartF);
    });
}

}  // namespace dormouse::DORMOUSE_ISA

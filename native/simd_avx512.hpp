// `F` and `W` as AVX-512 registers.
#pragma once

namespace dormouse::DORMOUSE_ISA {

using F = __m512;
using W = __m512i;

constexpr int kBlockRows = 6;
constexpr int kBlockCols = 4;
#ifdef __AVX512BF16__
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

inline F set(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline W set_word(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline W zero_words() { return _mm512_setzero_si512(); }
inline W load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store_words(uint32_t* p, W x) { _mm512_storeu_si512(p, x); }
inline F as_floats(W x) { return _mm512_castsi512_ps(x); }
inline W as_words(F x) { return _mm512_castps_si512(x); }
inline float first(F x) { return _mm512_cvtss_f32(x); }

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Of a NaN and a number these return the second argument, as the instruction does.
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F round_even(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x * 2^n for whole n from -200 to 127; x is about 1.
inline F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
// Lanes [begin, end) of x, `fill` in the others.
inline F keep(F x, int begin, int end, float fill) {
    const uint32_t below_end = end >= kLanes ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
    const uint32_t below_begin = begin >= kLanes ? 0xffffu : begin <= 0 ? 0u : (1u << begin) - 1;
    return _mm512_mask_mov_ps(set(fill), __mmask16(below_end & ~below_begin), x);
}
// Also where one is NaN.
inline bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0; }
inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
inline float reduce_min(F x) { return _mm512_reduce_min_ps(x); }
inline float reduce_add(F x) { return _mm512_reduce_add_ps(x); }

inline F load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
// 32 unsigned numbers, the low nibble of a byte before the high one.
template <int Bits>
inline void load_packed(const uint8_t* p, F out[2]) {
    __m128i low, high;
    if constexpr (Bits == 8) {
        low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
    } else {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), nibble = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(x, nibble), odd = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
        low = _mm_unpacklo_epi8(even, odd);
        high = _mm_unpackhi_epi8(even, odd);
    }
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(low));
    out[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(high));
}
// Whole numbers 0 to 255 as bytes.
inline void store_u8(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
// One bf16 in every lane.
inline F set_bf16(const uint16_t* p) {
    return as_floats(_mm512_slli_epi32(_mm512_set1_epi16(short(*p)), 16));
}

// The value of each lane rounded to bf16. NaN keeps its upper bits, which hold the quiet bit of any result.
inline F round_bf16(F x) {
    const W bits = as_words(x);
    const W odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const W sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const W rounded = _mm512_mask_mov_epi32(sum, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return as_floats(_mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000u))));
}
inline void store_bf16(uint16_t* p, F x) {
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(as_words(round_bf16(x)), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#ifdef __AVX512BF16__
inline F dot_pairs(F sum, W a, W b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// 32 consecutive values as 16 words.
inline W pair_neighbours(F low, F high) { return (W)_mm512_cvtne2ps_pbh(high, low); }
// Word i holds lane i of `even` and of `odd`.
inline W pair_lanes(F even, F odd) {
    const W order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                     23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, pair_neighbours(even, odd));
}
#endif

// Each word of `sum` plus the four products of its bytes: unsigned ones of `u`, signed ones of `s`.
inline W dot_bytes(W sum, W u, W s) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, u, s);
#else
    const W even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
    const W odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}
inline F whole_floats(W x) { return _mm512_cvtepi32_ps(x); }
// To the nearest whole number, ties to even.
inline W whole(F x) { return _mm512_cvtps_epi32(x); }
inline void store_bytes(int8_t* p, W x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline int sum_of(W x) { return _mm512_reduce_add_epi32(x); }
// The low or the high nibble of each byte.
inline W nibbles(W x, bool high) {
    return _mm512_and_si512(high ? _mm512_srli_epi16(x, 4) : x, _mm512_set1_epi8(15));
}
inline F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The first `count` words, zeros in the other lanes; nothing behind them is read.
inline W load_some(const uint32_t* p, int count) {
    return _mm512_maskz_loadu_epi32(count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1), p);
}
// Bits [shift, shift + Bits) of each word, as a float.
template <int Bits>
inline F field(W x, int shift) {
    const W bits = _mm512_srli_epi32(x, unsigned(shift));
    return _mm512_cvtepi32_ps(shift + Bits == 32 ? bits : _mm512_and_si512(bits, _mm512_set1_epi32((1 << Bits) - 1)));
}

// Word w of row r becomes word r of row w.
inline void transpose(W r[16]) {
    W t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace dormouse::DORMOUSE_ISA

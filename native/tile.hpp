// Keys and values of one tile out of their pages, dequantized and laid out for the products.
//
// K tile: columns of kColumn keys, in each [words, kColumn], so that keys are the lanes and a column is one
// stream. V tile: [words, dim], so that dimensions are the lanes. A word is a pair of bf16 (along the head for
// K, along the keys for V) or a float.
#pragma once

#include "simd.hpp"

namespace dormouse::DORMOUSE_ISA {

// What products are computed in.
enum class Math {
    Float,  // floats
    Bf16,   // floats that hold bf16 values: products are exact, sums are of floats
    Pairs,  // pairs of bf16, where the machine has the instruction
};

constexpr int per_word(Math math) { return math == Math::Pairs ? 2 : 1; }

constexpr int kColumn = kBlockCols * kLanes;

// Where rows of one half lie: the tables of a sequence, and one of its kv heads.
struct Source {
    const uint8_t* arena;
    const int32_t* pages;
    const Layer* layer;
    const Half* half;
    int kv_head;
};

// One row of a half.
template <int Bits>
struct Row {
    const uint8_t* data;
    const uint16_t* scales;
    const uint16_t* biases;
    int group_shift;

    const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(data); }

    // 16 stored floats from dimension d on.
    F values(int d) const {
        if constexpr (Bits == 32) return load(reinterpret_cast<const float*>(data) + d);
        return load_bf16(reinterpret_cast<const uint16_t*>(data) + d);
    }
    // 32 values from d on, d a multiple of 32; 16 where the row ends.
    void values(int d, int dim, F out[2]) const {
        if constexpr (Bits >= 16) {
            out[0] = values(d);
            out[1] = d + kLanes < dim ? values(d + kLanes) : zero();
        } else {
            // q and scale have 16 bits between them: their product is exact and fusing changes nothing.
            const F scale = set_bf16(scales + (d >> group_shift)), bias = set_bf16(biases + (d >> group_shift));
            load_packed<Bits>(data + d * Bits / 8, out);
            out[0] = fma(out[0], scale, bias);
            out[1] = fma(out[1], scale, bias);
        }
    }
};

// The rows from `key` to the end of its page, in steps of `next`.
template <int Bits>
struct Rows {
    Row<Bits> row;
    int data_step;
    int scale_step;

    Rows(const Source& from, int key) {
        const Layer& layer = *from.layer;
        const Half& half = *from.half;
        const uint8_t* page = from.arena + from.pages[key / layer.block_size] * layer.block_nbytes;
        const int64_t first = int64_t(from.kv_head) * layer.block_size + key % layer.block_size;
        data_step = half.dim * Bits / 8;
        scale_step = Bits < 16 ? half.dim / layer.group_size : 0;
        row.data = page + half.data + first * data_step;
        row.scales = reinterpret_cast<const uint16_t*>(page + half.scales) + first * scale_step;
        row.biases = reinterpret_cast<const uint16_t*>(page + half.biases) + first * scale_step;
        row.group_shift = layer.group_size == 64 ? 6 : 5;
    }
    Row<Bits> operator[](int i) const {
        return {row.data + i * data_step, row.scales + i * scale_step, row.biases + i * scale_step,
                row.group_shift};
    }
};

// Words `w` to `w + 15` of 16 keys, to `out` on.
inline void store_key_words(W words[kLanes], int count, uint32_t* out) {
    transpose(words);
    for (int i = 0; i < count; ++i) store_words(out + i * kColumn, words[i]);
}

// Stored floats: each key's row becomes words, then words and keys change places.
template <Math M, int Bits>
inline void load_plain_keys(const Rows<Bits>& rows, int count, int dim, uint32_t* out) {
    const int words = dim / per_word(M);
    for (int w = 0; w < words; w += kLanes) {
        W block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int d = w * per_word(M);
            if (i >= count) {
                block[i] = zero_words();
            } else if constexpr (M == Math::Pairs) {
                block[i] = pair_neighbours(rows[i].values(d), d + kLanes < dim ? rows[i].values(d + kLanes) : zero());
            } else {
                block[i] = as_words(M == Math::Bf16 ? round_bf16(rows[i].values(d)) : rows[i].values(d));
            }
        }
        store_key_words(block, least(kLanes, words - w), out + w * kColumn);
    }
}

// One number of each key: scales or biases of a group. Lanes from `count` on are zero.
inline F of_keys(const uint16_t* first, int step, int count) {
    alignas(64) float lane[kLanes] = {};
    if (step == 1 && count == kLanes) return load_bf16(first);
    for (int i = 0; i < count; ++i) lane[i] = from_bf16(first[i * step]);
    return load(lane);
}

// Packed values: words and keys change places while they are packed, which is the least to move; then a word
// of 16 keys unfolds into its values, with scales and biases of keys as vectors.
template <Math M, int Bits>
inline void load_packed_keys(const Rows<Bits>& rows, int count, int dim, uint32_t* out) {
    constexpr int kFields = 32 / Bits;
    const int group = 1 << rows.row.group_shift, words = dim / kFields;
    F scale = zero(), bias = zero();
    for (int w = 0; w < words; w += kLanes) {
        W block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            block[i] = i < count ? load_some(rows[i].words() + w, words - w) : zero_words();
        }
        transpose(block);
        const int end = least(kLanes, words - w);
        for (int i = 0; i < end; ++i) {
            const int d = (w + i) * kFields;
            if (d % group == 0) {
                scale = of_keys(rows.row.scales + d / group, rows.scale_step, count);
                bias = of_keys(rows.row.biases + d / group, rows.scale_step, count);
            }
            uint32_t* to = out + d / per_word(M) * kColumn;
            for (int f = 0; f < kFields; f += per_word(M), to += kColumn) {
                const F x = fma(field<Bits>(block[i], f * Bits), scale, bias);
                if constexpr (M == Math::Pairs) {
                    store_words(to, pair_lanes(x, fma(field<Bits>(block[i], f * Bits + Bits), scale, bias)));
                } else {
                    store_words(to, as_words(M == Math::Bf16 ? round_bf16(x) : x));
                }
            }
        }
    }
}

// Keys [begin, end) of the tile that starts at position `first`; `begin` is a multiple of 16. The other keys of
// the tile become zeros: nothing of theirs is read, and their weight of zero finds no NaN to meet.
template <Math M, int Bits>
void load_keys(const Source& from, int first, int begin, int end, uint32_t* tile) {
    const int dim = from.half->dim, words = dim / per_word(M);
    for (int key = 0; key < kTile; key += kLanes) {
        uint32_t* out = tile + key / kColumn * kColumn * words + key % kColumn;
        if (key < begin || key >= end) {
            for (int w = 0; w < words; ++w) store_words(out + w * kColumn, zero_words());
            continue;
        }
        const Rows<Bits> rows(from, first + key);
        if constexpr (Bits < 16) {
            load_packed_keys<M>(rows, least(kLanes, end - key), dim, out);
        } else {
            load_plain_keys<M>(rows, least(kLanes, end - key), dim, out);
        }
    }
}

// Two rows of values, or one and zeros, from dimension d on: 32 dimensions, or the 16 that are left.
template <Math M, int Bits>
inline void store_value_words(const Row<Bits>& row, const Row<Bits>* next, int d, int dim, uint32_t* out) {
    F x[2], y[2] = {zero(), zero()};
    row.values(d, dim, x);
    if (next) next->values(d, dim, y);
    for (int i = 0; i < 2 && d + i * kLanes < dim; ++i) {
        if constexpr (M == Math::Pairs) {
            store_words(out + d + i * kLanes, pair_lanes(x[i], y[i]));
        } else {
            store_words(out + d + i * kLanes, as_words(M == Math::Bf16 ? round_bf16(x[i]) : x[i]));
        }
    }
}

template <Math M, int Bits>
void load_values(const Source& from, int first, int begin, int end, uint32_t* tile) {
    const int dim = from.half->dim;
    for (int key = 0; key < kTile; key += kLanes) {
        uint32_t* out = tile + key / per_word(M) * dim;
        const int count = least(kLanes, end - key);
        if (key < begin || count <= 0) {
            std::memset(out, 0, sizeof(uint32_t) * size_t(kLanes / per_word(M) * dim));
            continue;
        }
        const Rows<Bits> rows(from, first + key);
        for (int i = 0; i < kLanes; i += per_word(M), out += dim) {
            if (i >= count) {
                std::memset(out, 0, sizeof(uint32_t) * size_t(dim));
                continue;
            }
            const Row<Bits> row = rows[i], next = rows[i + 1 < count ? i + 1 : i];
            const Row<Bits>* second = i + 1 < count ? &next : nullptr;
            for (int d = 0; d < dim; d += 2 * kLanes) store_value_words<M>(row, second, d, dim, out);
        }
    }
}

template <Math M>
void load_keys(const Source& from, int first, int begin, int end, uint32_t* tile) {
    switch (from.half->bits) {
        case 4: return load_keys<M, 4>(from, first, begin, end, tile);
        case 8: return load_keys<M, 8>(from, first, begin, end, tile);
        case 16: return load_keys<M, 16>(from, first, begin, end, tile);
        default: return load_keys<M, 32>(from, first, begin, end, tile);
    }
}

template <Math M>
void load_values(const Source& from, int first, int begin, int end, uint32_t* tile) {
    switch (from.half->bits) {
        case 4: return load_values<M, 4>(from, first, begin, end, tile);
        case 8: return load_values<M, 8>(from, first, begin, end, tile);
        case 16: return load_values<M, 16>(from, first, begin, end, tile);
        default: return load_values<M, 32>(from, first, begin, end, tile);
    }
}

}  // namespace dormouse::DORMOUSE_ISA

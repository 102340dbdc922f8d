// A block of query rows against one tile: scores, streaming softmax, weighted values.
//
// Row invariance rests on this file: a row's sums run along the head and along the keys in one order, each in
// its own accumulator, whatever R is and whatever the other rows are. Masked keys weigh exactly zero.
#pragma once

#include "tile.hpp"

namespace dormouse::DORMOUSE_ISA {

constexpr float kNoScore = -__builtin_inff();

// Running maximum (unscaled), sum of weights per lane, weighted sum of values, of each row.
struct State {
    float* m;
    float* l;  // [rows, kLanes]
    float* o;  // [rows, v.dim]

    static size_t num_floats(int rows, int v_dim) {
        return size_t(round_up(rows, kLanes)) + size_t(rows) * size_t(kLanes + v_dim);
    }
    static State at(float* memory, int rows) {
        float* l = memory + round_up(rows, kLanes);
        return {memory, l, l + size_t(rows) * kLanes};
    }
};

// Keys [begin, end) of the tile that a row attends to.
struct Span {
    int begin;
    int end;
};

struct Block {
    const uint32_t* q;  // [R, q_words]
    const uint32_t* k;
    const uint32_t* v;
    const Span* spans;  // [R]
    Span keys;          // the union of the spans
    float* scores;      // [R, kTile]
    uint32_t* weights;  // [R, kTile / per_word]
    State state;        // at the block's first row
    int q_words;
    int v_dim;
    float scale;  // times log2(e)
};

template <Math M>
inline F dot(F sum, W a, W b) {
    if constexpr (M == Math::Pairs) {
        return dot_pairs(sum, a, b);
    } else {
        return fma(as_floats(a), as_floats(b), sum);
    }
}

template <Math M, int R, int C>
inline void score_columns(const Block& b, int key) {
    F sum[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sum[r][c] = zero();
    }
    const uint32_t* k = b.k + key * b.q_words;
    for (int w = 0; w < b.q_words; ++w, k += kColumn) {
        W column[C];
        for (int c = 0; c < C; ++c) column[c] = load_words(k + c * kLanes);
        for (int r = 0; r < R; ++r) {
            const W q = set_word(b.q[r * b.q_words + w]);
            for (int c = 0; c < C; ++c) sum[r][c] = dot<M>(sum[r][c], q, column[c]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) store(b.scores + r * kTile + key + c * kLanes, sum[r][c]);
    }
}

template <Math M, int R>
inline void score(const Block& b) {
    for (int key = b.keys.begin / kColumn * kColumn; key < b.keys.end; key += kColumn) {
        score_columns<M, R, kBlockCols>(b, key);
    }
}

template <Math M>
inline void store_weights(uint32_t* out, F low, F high) {
    if constexpr (M == Math::Pairs) {
        store_words(out, pair_neighbours(low, high));
    } else {
        store_words(out, as_words(M == Math::Bf16 ? round_bf16(low) : low));
        store_words(out + kLanes, as_words(M == Math::Bf16 ? round_bf16(high) : high));
    }
}

// Scores of keys [begin, end) of the tile, multiples of 32, to weights. Returns the factor for what the row
// has summed so far. `masked`: some of these keys are outside the row's span.
template <Math M, bool Masked>
inline float weigh(float* s, Span span, int begin, int end, float scale, float& m, float* l, uint32_t* weights) {
    const float before = m;
    F top = set(before);
    for (int key = begin; key < end; key += kLanes) {
        F x = load(s + key);
        if constexpr (Masked) {
            x = keep(x, span.begin - key, span.end - key, kNoScore);
            store(s + key, x);
        }
        top = max(top, x);
    }
    float factor = 1.0f;
    if (any_greater(top, set(before))) {
        m = reduce_max(top);
        factor = exp2((before - m) * scale);
    }
    const F shift = set(m == kNoScore ? 0.0f : -m * scale), by = set(scale);
    F sum = zero();
    for (int key = begin; key < end; key += 2 * kLanes) {
        const F low = exp2<M == Math::Float>(fma(load(s + key), by, shift));
        const F high = exp2<M == Math::Float>(fma(load(s + key + kLanes), by, shift));
        sum = add(add(sum, low), high);
        store_weights<M>(weights + key / per_word(M), low, high);
    }
    store(l, fma(load(l), set(factor), sum));
    return factor;
}

template <Math M, int R>
inline void weigh_rows(const Block& b, float* factors) {
    const int begin = b.keys.begin / (2 * kLanes) * (2 * kLanes), end = round_up(b.keys.end, 2 * kLanes);
    for (int r = 0; r < R; ++r) {
        float* s = b.scores + r * kTile;
        uint32_t* weights = b.weights + r * (kTile / per_word(M));
        float* l = b.state.l + r * kLanes;
        const Span span = b.spans[r];
        factors[r] = span.begin <= begin && span.end >= end
                         ? weigh<M, false>(s, span, begin, end, b.scale, b.state.m[r], l, weights)
                         : weigh<M, true>(s, span, begin, end, b.scale, b.state.m[r], l, weights);
    }
}

template <Math M, int R, int C>
inline void add_columns(const Block& b, const float* factors, int d) {
    F sum[R][C];
    for (int r = 0; r < R; ++r) {
        const F factor = set(factors[r]);
        for (int c = 0; c < C; ++c) sum[r][c] = mul(load(b.state.o + r * b.v_dim + d + c * kLanes), factor);
    }
    const int end = (b.keys.end + per_word(M) - 1) / per_word(M);
    for (int w = b.keys.begin / per_word(M); w < end; ++w) {
        const uint32_t* v = b.v + w * b.v_dim + d;
        W column[C];
        for (int c = 0; c < C; ++c) column[c] = load_words(v + c * kLanes);
        for (int r = 0; r < R; ++r) {
            const W weight = set_word(b.weights[r * (kTile / per_word(M)) + w]);
            for (int c = 0; c < C; ++c) sum[r][c] = dot<M>(sum[r][c], weight, column[c]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) store(b.state.o + r * b.v_dim + d + c * kLanes, sum[r][c]);
    }
}

template <Math M, int R, int C>
inline void add_values(const Block& b, const float* factors, int d) {
    for (; d + C * kLanes <= b.v_dim; d += C * kLanes) add_columns<M, R, C>(b, factors, d);
    if constexpr (C > 1) {
        if (d < b.v_dim) add_values<M, R, C - 1>(b, factors, d);
    }
}

template <Math M, int R>
void attend_block(const Block& b) {
    float factors[R];
    score<M, R>(b);
    weigh_rows<M, R>(b, factors);
    add_values<M, R, kBlockCols>(b, factors, 0);
}

// `rows` is at most kBlockRows.
template <Math M, int R = kBlockRows>
inline void attend_block(const Block& b, int rows) {
    if (rows == R) return attend_block<M, R>(b);
    if constexpr (R > 1) attend_block<M, R - 1>(b, rows);
}

}  // namespace dormouse::DORMOUSE_ISA

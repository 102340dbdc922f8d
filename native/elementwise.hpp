// Kernels that treat every row alike and alone: norms, rotary embedding, gated activations.
#pragma once

#include "quantize.hpp"

namespace dormouse::DORMOUSE_ISA {

// The sum is rounded to the dtype before it is normed: what the next layer reads is what was normed.
inline void add_to_residual(const NormArgs& args, int64_t row) {
    for (int64_t i = row * args.dim; i < (row + 1) * args.dim; i += kLanes) {
        const F sum = add(load_as(args.residual, args.dtype, i), load_as(args.x, args.dtype, i));
        store_as(args.residual, args.dtype, i, sum);
    }
}

inline void norm(const NormArgs& args, int64_t begin, int64_t end) {
    const void* x = args.residual ? args.residual : args.x;
    const F one = set(args.add_one ? 1.0f : 0.0f);
    for (int64_t row = begin; row < end; ++row) {
        if (args.residual) add_to_residual(args, row);
        const int64_t at = row * args.dim;
        F squares = zero();
        for (int i = 0; i < args.dim; i += kLanes) {
            const F value = load_as(x, args.dtype, at + i);
            squares = fma(value, value, squares);
        }
        const float mean = reduce_add(squares) / float(args.dim);
        const F factor = set(1.0f / __builtin_sqrtf(mean + args.eps));
        for (int i = 0; i < args.dim; i += kLanes) {
            const F weight = add(load_as(args.weight, args.dtype, i), one);
            store_as(args.out, args.dtype, at + i, mul(mul(load_as(x, args.dtype, at + i), factor), weight));
        }
    }
}

// Rotates dimension i with dimension i + half, as transformers does. Dimensions from 2 * half on stay.
inline void rope(const RopeArgs& args, int64_t begin, int64_t end) {
    const int half = args.rotary_dim / 2;
    alignas(64) float x[kMaxHeadDim];
    for (int64_t row = begin; row < end; ++row) {
        const float* cos = args.cos + args.positions[row] * half;
        const float* sin = args.sin + args.positions[row] * half;
        for (int h = 0; h < args.heads; ++h) {
            const int64_t at = row * args.stride + int64_t(h) * args.dim;
            load_row(args.x, args.dtype, at, args.rotary_dim, x);
            for (int i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i];
                x[i + half] = b * cos[i] + a * sin[i];
            }
            for (int i = 0; i < args.rotary_dim; i += kLanes) store_as(args.x, args.dtype, at + i, load(x + i));
        }
    }
}

// x * sigmoid(y). The bound keeps 2^x finite; beyond it the result is zero anyway.
inline F times_sigmoid(F x, F y) {
    const F e = exp2<true>(min(set(126.0f), mul(y, set(-1.44269504088896341f))));
    return div(x, add(set(1.0f), e));
}

inline F silu(F x) { return times_sigmoid(x, x); }

// x * (1 + tanh(y)) / 2 is x * sigmoid(2 y).
inline F gelu_tanh(F x) {
    const F cubic = fma(mul(mul(x, x), x), set(0.044715f), x);
    return times_sigmoid(x, mul(cubic, set(1.5957691216057308f)));
}

inline void gate(const GateArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        for (int i = 0; i < args.ffn; i += kLanes) {
            const F gate = load_as(args.gate_up, args.dtype, 2 * row * args.ffn + i);
            const F up = load_as(args.gate_up, args.dtype, (2 * row + 1) * args.ffn + i);
            store_as(args.out, args.dtype, row * args.ffn + i, mul(args.gelu ? gelu_tanh(gate) : silu(gate), up));
        }
    }
}

}  // namespace dormouse::DORMOUSE_ISA

// Rows of K or V into their place in a page, quantized.
#pragma once

#include "simd.hpp"

namespace dormouse::DORMOUSE_ISA {

inline F load_as(const void* from, Dtype dtype, int64_t i) {
    return dtype == Dtype::F32 ? load(static_cast<const float*>(from) + i)
                               : load_bf16(static_cast<const uint16_t*>(from) + i);
}

inline void store_as(void* to, Dtype dtype, int64_t i, F x) {
    if (dtype == Dtype::F32) {
        store(static_cast<float*>(to) + i, x);
    } else {
        store_bf16(static_cast<uint16_t*>(to) + i, x);
    }
}

// A row of `dim` values as floats, whatever it is stored as.
inline void load_row(const void* rows, Dtype dtype, int64_t offset, int dim, float* out) {
    if (dtype == Dtype::F32) {
        std::memcpy(out, static_cast<const float*>(rows) + offset, size_t(dim) * 4);
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(rows) + offset;
    for (int d = 0; d < dim; d += kLanes) store(out + d, load_bf16(from + d));
}

// One group: x = q * scale + bias. Each operation is the reference's, in its order, none of them fused.
// A NaN makes its whole group NaN, as it does in the reference. A bias of -0 becomes 0: which of the two zeros
// is the minimum depends on the order of comparison.
inline void quantize_group(const float* x, int size, float levels, uint8_t* q, uint16_t* scale, uint16_t* bias) {
    F low = load(x), high = low;
    bool has_nan = false;
    for (int i = 0; i < size; i += kLanes) {
        const F values = load(x + i);
        low = min(low, values);
        high = max(high, values);
        has_nan |= any_greater(values, set(__builtin_inff()));
    }
    const float lo = has_nan ? __builtin_nanf("") : reduce_min(low) + 0.0f;
    const float hi = has_nan ? lo : reduce_max(high);
    *bias = to_bf16(lo);
    *scale = to_bf16((hi - lo) / levels);
    const float step = from_bf16(*scale);
    const F base = set(from_bf16(*bias)), inverse = set(step > 0.0f ? 1.0f / step : 0.0f);
    for (int i = 0; i < size; i += kLanes) {
        const F exact = mul(sub(load(x + i), base), inverse);
        store_u8(q + i, round_even(min(max(exact, zero()), set(levels))));
    }
}

// `row` counts [kv_heads, block_size] rows of the page.
inline void write_row(const Half& half, int group_size, uint8_t* page, int64_t row, const float* x) {
    uint8_t* data = page + half.data + row * half.dim * half.bits / 8;
    if (half.bits == 32) {
        std::memcpy(data, x, size_t(half.dim) * 4);
        return;
    }
    if (half.bits == 16) {
        auto* out = reinterpret_cast<uint16_t*>(data);
        for (int d = 0; d < half.dim; ++d) out[d] = to_bf16(x[d]);
        return;
    }
    uint8_t q[kMaxHeadDim];
    const int groups = half.dim / group_size;
    auto* scales = reinterpret_cast<uint16_t*>(page + half.scales) + row * groups;
    auto* biases = reinterpret_cast<uint16_t*>(page + half.biases) + row * groups;
    for (int g = 0; g < groups; ++g) {
        const int at = g * group_size;
        quantize_group(x + at, group_size, float((1 << half.bits) - 1), q + at, scales + g, biases + g);
    }
    if (half.bits == 8) {
        std::memcpy(data, q, size_t(half.dim));
    } else {
        // Little-endian words of eight nibbles are bytes of two, the first value in the low one.
        for (int d = 0; d < half.dim / 2; ++d) data[d] = uint8_t(q[2 * d] | q[2 * d + 1] << 4);
    }
}

inline void write(const WriteArgs& args, int64_t begin, int64_t end) {
    const Layer& layer = *args.layer;
    const int heads = layer.kv_heads;
    alignas(64) float x[kMaxHeadDim];
    for (int64_t r = begin; r < end; ++r) {
        const int64_t slot = args.slots[r];
        uint8_t* page = args.arena + slot / layer.block_size * layer.block_nbytes;
        for (int h = 0; h < heads; ++h) {
            const int64_t row = int64_t(h) * layer.block_size + slot % layer.block_size;
            load_row(args.k, args.dtype, r * args.k_stride + int64_t(h) * layer.k.dim, layer.k.dim, x);
            write_row(layer.k, layer.group_size, page, row, x);
            load_row(args.v, args.dtype, r * args.v_stride + int64_t(h) * layer.v.dim, layer.v.dim, x);
            write_row(layer.v, layer.group_size, page, row, x);
        }
    }
}

}  // namespace dormouse::DORMOUSE_ISA

// A layer of a decoder in two calls: what the kernels do one by one, without a way back between them.
//
// At one row a step is a few hundred kernels of some microseconds each, and calling each of them costs as much.
#include <type_traits>

#include "rows.hpp"

namespace dormouse {

namespace {

size_t size_of(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

template <class T>
T* at(T* values, Dtype dtype, int64_t i) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return static_cast<Byte*>(values) + i * int64_t(size_of(dtype));
}

void run(const DecoderLayer& layer, const Product& p, const void* x, int64_t rows, void* out, int num_threads) {
    linear({p.weight, p.bits, p.inputs, p.outputs, x, p.inputs, p.bias, out, layer.dtype, layer.dtype, nullptr,
            nullptr, nullptr},
           rows, num_threads);
}

NormArgs norm_of(const DecoderLayer& layer, const void* x, void* residual, const void* weight, void* out, int dim) {
    return {x, residual, weight, out, layer.dtype, dim, layer.eps, layer.add_one};
}

// One row's heads are as many rows of a norm, in place.
void norm_heads(const DecoderLayer& layer, const Kernels& isa, void* heads, int count, const void* weight) {
    if (weight) isa.norm(norm_of(layer, heads, nullptr, weight, heads, layer.kv.k.dim), 0, count);
}

}  // namespace

void project(const DecoderLayer& layer, const void* x, int64_t rows, const int64_t* positions, const int64_t* slots,
             uint8_t* arena, void* qkv, int num_threads) {
    run(layer, layer.qkv, x, rows, qkv, num_threads);
    const Kernels& isa = kernels();
    const int dim = layer.kv.k.dim, kv_heads = layer.kv.kv_heads, width = layer.qkv.outputs;
    const auto k = at(qkv, layer.dtype, int64_t(layer.heads) * dim);
    const auto v = at(qkv, layer.dtype, int64_t(layer.heads + kv_heads) * dim);
    const RopeArgs rotate{qkv, width, layer.cos, layer.sin, positions, layer.dtype, layer.heads + kv_heads, dim,
                          layer.rotary_dim};
    const WriteArgs store{arena, &layer.kv, k, v, width, width, layer.dtype, slots};
    over_rows(rows, grain_for(width), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            norm_heads(layer, isa, at(qkv, layer.dtype, row * width), layer.heads, layer.q_norm);
            norm_heads(layer, isa, at(k, layer.dtype, row * width), kv_heads, layer.k_norm);
            if (layer.cos) isa.rope(rotate, row, row + 1);
            isa.write(store, row, row + 1);
        }
    });
}

void complete(const DecoderLayer& layer, AttendArgs args, int64_t rows, void* residual, const void* next_norm, void* out,
              int num_threads) {
    const size_t row_nbytes = size_t(rows) * size_of(layer.dtype);
    void* attended = scratch(2, row_nbytes * size_t(layer.o.inputs));
    void* wide = scratch(3, row_nbytes * size_t(layer.gate_up.outputs));
    void* gated = scratch(4, row_nbytes * size_t(layer.down.inputs));
    args.out = attended;
    attend(args, num_threads);
    run(layer, layer.o, attended, rows, out, num_threads);
    if (layer.attention_output_norm) {
        norm(norm_of(layer, out, nullptr, layer.attention_output_norm, out, layer.hidden), rows, num_threads);
    }
    norm(norm_of(layer, out, residual, layer.mlp_norm, out, layer.hidden), rows, num_threads);
    run(layer, layer.gate_up, out, rows, wide, num_threads);
    gate({wide, gated, layer.dtype, layer.down.inputs, layer.gelu}, rows, num_threads);
    run(layer, layer.down, gated, rows, out, num_threads);
    if (layer.mlp_output_norm) {
        norm(norm_of(layer, out, nullptr, layer.mlp_output_norm, out, layer.hidden), rows, num_threads);
    }
    norm(norm_of(layer, out, residual, next_norm, out, layer.hidden), rows, num_threads);
}

}  // namespace dormouse

// Bindings only: types and shapes are checked here, so that nothing below can be led outside its tensors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"

using namespace nb::literals;
using namespace dormouse;

namespace {

using HalfTuple = std::tuple<int, int, int64_t, int64_t, int64_t>;

Half make_half(const HalfTuple& parts, const Layer& layer) {
    const auto [bits, dim, data, scales, biases] = parts;
    require(bits == 4 || bits == 8 || bits == 16 || bits == 32, "bits must be 4, 8, 16 or 32");
    require(dim > 0 && dim % kLanes == 0 && dim <= kMaxHeadDim, "head size must be a multiple of 16, at most 512");
    require(bits >= 16 || dim % layer.group_size == 0, "group size must divide the head size");
    const int64_t rows = int64_t(layer.kv_heads) * layer.block_size;
    const auto inside = [&](int64_t offset, int64_t nbytes) {
        require(offset >= 0 && offset % 4 == 0 && offset + nbytes <= layer.block_nbytes, "section outside its page");
    };
    inside(data, rows * dim * bits / 8);
    if (bits < 16) {
        inside(scales, rows * (dim / layer.group_size) * 2);
        inside(biases, rows * (dim / layer.group_size) * 2);
    }
    return {bits, dim, data, scales, biases};
}

Layer make_layer(const HalfTuple& k, const HalfTuple& v, int kv_heads, int block_size, int group_size, int64_t nbytes) {
    Layer layer;
    require(kv_heads > 0, "kv_heads must be positive");
    require(block_size >= 16 && block_size <= 512 && !(block_size & (block_size - 1)),
            "block size must be a power of two from 16 to 512");
    require(group_size == 32 || group_size == 64, "group size must be 32 or 64");
    require(nbytes > 0 && nbytes % 4 == 0, "block_nbytes must be a positive multiple of 4");
    layer.kv_heads = kv_heads;
    layer.block_size = block_size;
    layer.group_size = group_size;
    layer.block_nbytes = nbytes;
    layer.k = make_half(k, layer);
    layer.v = make_half(v, layer);
    return layer;
}

void bind_write_kv(Arena arena, const Layer& layer, Tensor k, Tensor v, Longs slots, int num_threads) {
    const int64_t rows = int64_t(slots.shape(0));
    require_arena(arena, layer);
    require_shape(k, {rows, layer.kv_heads, layer.k.dim}, "k");
    require_shape(v, {rows, layer.kv_heads, layer.v.dim}, "v");
    const Dtype dtype = dtype_of(k, "k");
    require_dtype(v, dtype, "v");
    const int64_t num_slots = int64_t(arena.shape(0)) * layer.block_size;
    for (int64_t r = 0; r < rows; ++r) {
        require(slots.data()[r] >= 0 && slots.data()[r] < num_slots, "slot outside the arena");
    }
    if (rows == 0) return;
    const WriteArgs args{arena.data(), &layer, k.data(), v.data(), row_stride(k, "k"), row_stride(v, "v"), dtype,
                         slots.data()};
    nb::gil_scoped_release release;
    write_kv(args, rows, num_threads);
}

void bind_attend(Arena arena, const Layer& layer, Tensor q, Tensor out, Ints row_offsets, Ints starts, Table page_table,
                 float scale, int window, int num_threads) {
    require_arena(arena, layer);
    require(q.ndim() == 3, "q must be [rows, heads, k_dim]");
    const int64_t rows = int64_t(q.shape(0)), heads = int64_t(q.shape(1)), chunks = int64_t(starts.shape(0));
    require_attention(heads, layer.kv_heads, scale, window);
    require_shape(q, {rows, heads, layer.k.dim}, "q");
    require_shape(out, {rows, heads, layer.v.dim}, "out");
    const Dtype dtype = dtype_of(q, "q");
    require_dtype(out, dtype, "out");
    require_contiguous(out, "out");
    require_table(row_offsets, starts, page_table, layer.block_size);
    if (rows == 0) return;
    const AttendArgs args{arena.data(), &layer, q.data(), row_stride(q, "q"), out.data(), dtype, int(heads),
                          row_offsets.data(), starts.data(), page_table.data(), int(chunks), int(page_table.shape(1)),
                          scale, window};
    require_chunks(args, rows, int64_t(arena.shape(0)));
    nb::gil_scoped_release release;
    attend(args, num_threads < 1 ? 1 : num_threads);
}

void bind_norm(Tensor x, nb::object residual, Tensor weight, Tensor out, float eps, bool add_one, int num_threads) {
    require(x.ndim() == 2 && x.shape(1) > 0 && x.shape(1) % kLanes == 0, "x must be [rows, dim], dim a multiple of 16");
    const int64_t rows = int64_t(x.shape(0)), dim = int64_t(x.shape(1));
    const Dtype dtype = dtype_of(x, "x");
    void* sum = nullptr;
    if (!residual.is_none()) {
        auto tensor = nb::cast<Tensor>(residual);
        require_shape(tensor, {rows, dim}, "residual");
        require_dtype(tensor, dtype, "residual");
        require_contiguous(tensor, "residual");
        sum = tensor.data();
    }
    require_shape(weight, {dim}, "weight");
    require_shape(out, {rows, dim}, "out");
    require_dtype(weight, dtype, "weight");
    require_dtype(out, dtype, "out");
    require(weight.stride(0) == 1, "weight must be contiguous");
    require_contiguous(x, "x");
    require_contiguous(out, "out");
    if (rows == 0) return;
    const NormArgs args{x.data(), sum, weight.data(), out.data(), dtype, int(dim), eps, add_one};
    nb::gil_scoped_release release;
    norm(args, rows, num_threads);
}

void bind_rope(Tensor x, Floats cos, Floats sin, Longs positions, int num_threads) {
    require(x.ndim() == 3, "x must be [rows, heads, dim]");
    const int64_t rows = int64_t(x.shape(0)), dim = int64_t(x.shape(2)), half = int64_t(cos.shape(1));
    require(dim % kLanes == 0 && dim <= kMaxHeadDim, "head size must be a multiple of 16, at most 512");
    require(2 * half <= dim && 2 * half % kLanes == 0, "rotated dimensions must be a multiple of 16, at most the head");
    require(sin.shape(0) == cos.shape(0) && int64_t(sin.shape(1)) == half, "cos and sin must have one shape");
    require(int64_t(positions.shape(0)) == rows, "positions must have one entry per row");
    for (int64_t r = 0; r < rows; ++r) {
        require(positions.data()[r] >= 0 && positions.data()[r] < int64_t(cos.shape(0)), "position outside the tables");
    }
    if (rows == 0) return;
    const RopeArgs args{x.data(), row_stride(x, "x"), cos.data(), sin.data(), positions.data(), dtype_of(x, "x"),
                        int(x.shape(1)), int(dim), int(2 * half)};
    nb::gil_scoped_release release;
    rope(args, rows, num_threads);
}

void bind_gate(Tensor gate_up, Tensor out, bool gelu, int num_threads) {
    require(out.ndim() == 2 && out.shape(1) > 0 && out.shape(1) % kLanes == 0,
            "out must be [rows, ffn], ffn a multiple of 16");
    const int64_t rows = int64_t(out.shape(0)), ffn = int64_t(out.shape(1));
    require_shape(gate_up, {rows, 2 * ffn}, "gate_up");
    const Dtype dtype = dtype_of(gate_up, "gate_up");
    require_dtype(out, dtype, "out");
    require_contiguous(gate_up, "gate_up");
    require_contiguous(out, "out");
    if (rows == 0) return;
    const GateArgs args{gate_up.data(), out.data(), dtype, int(ffn), gelu};
    nb::gil_scoped_release release;
    gate(args, rows, num_threads);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; i < num_isas(); ++i) names.emplace_back(isa_at(i).name);
    return names;
}

void set_isa(const std::string& name) {
    if (!use_isa(name.c_str())) throw nb::value_error(("this machine cannot run " + name).c_str());
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Kernels over pages of quantized KV. Thin: use dormouse.runtimes.torch.native.";
    nb::class_<Layer>(m, "Layer", "Where the K and V of one layer lie in a page.")
        .def_static("make", &make_layer, "k"_a, "v"_a, "kv_heads"_a, "block_size"_a, "group_size"_a, "block_nbytes"_a,
                    "Each half is (bits, head size, offset of data, of scales, of biases).");
    m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
    m.def("isas", &isas, "Those that this machine runs, best first.");
    m.def("set_isa", &set_isa, "name"_a, "Use another one, for tests and benchmarks.");
    m.def("write_kv", &bind_write_kv, "arena"_a.noconvert(), "layer"_a, "k"_a.noconvert(), "v"_a.noconvert(),
          "slots"_a.noconvert(), "num_threads"_a);
    m.def("attend", &bind_attend, "arena"_a.noconvert(), "layer"_a, "q"_a.noconvert(), "out"_a.noconvert(),
          "row_offsets"_a.noconvert(), "starts"_a.noconvert(), "page_table"_a.noconvert(), "scale"_a, "window"_a,
          "num_threads"_a);
    m.def("norm", &bind_norm, "x"_a.noconvert(), "residual"_a.none(), "weight"_a.noconvert(), "out"_a.noconvert(),
          "eps"_a, "add_one"_a, "num_threads"_a);
    m.def("rope", &bind_rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "positions"_a.noconvert(),
          "num_threads"_a);
    m.def("gate", &bind_gate, "gate_up"_a.noconvert(), "out"_a.noconvert(), "gelu"_a, "num_threads"_a);
    bind_linears(m);
    bind_layers(m);
}

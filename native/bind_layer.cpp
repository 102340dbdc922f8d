// Bindings of a whole layer. Its tensors are checked once, when it is made, and kept alive by it.
#include "bindings.hpp"

using namespace nb::literals;

namespace dormouse {

namespace {

using Bias = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct BoundLayer {
    DecoderLayer layer{};
    int64_t num_positions = 0;
    std::vector<Tensor> kept;  // what the pointers point into
};

// (packed, bits, bias or None): the last two dimensions are known from the layer.
Product product_of(nb::tuple parts, int inputs, int outputs, BoundLayer& owner) {
    require(parts.size() == 3, "a linear layer is (packed, bits, bias)");
    const auto packed = nb::cast<Packed>(parts[0]);
    const int bits = nb::cast<int>(parts[1]);
    require_weight(packed, outputs, inputs, bits);
    owner.kept.emplace_back(packed.handle());
    const float* bias = nullptr;
    if (!parts[2].is_none()) {
        const auto added = nb::cast<Bias>(parts[2]);
        require(int64_t(added.shape(0)) == outputs, "bias must have one value per output");
        bias = added.data();
        owner.kept.emplace_back(added.handle());
    }
    return {packed.data(), bits, inputs, outputs, bias};
}

const void* norm_weight(nb::object weight, int dim, Dtype dtype, BoundLayer& owner) {
    if (weight.is_none()) return nullptr;
    const auto tensor = nb::cast<Tensor>(weight);
    require_shape(tensor, {dim}, "norm weight");
    require_dtype(tensor, dtype, "norm weight");
    require(tensor.stride(0) == 1, "norm weight must be contiguous");
    owner.kept.push_back(tensor);
    return tensor.data();
}

BoundLayer make_decoder_layer(const Layer& kv, nb::tuple linears, nb::tuple norms, nb::object cos, nb::object sin,
                              int hidden, int ffn, int heads, int window, float scale, float eps, bool add_one,
                              bool gelu) {
    require(linears.size() == 4, "a layer has four linear layers: qkv, o, gate_up, down");
    require(norms.size() == 5, "a layer has five norms: q, k, attention output, mlp, mlp output");
    require(kv.k.dim == kv.v.dim, "K and V must have one head size");
    require_attention(heads, kv.kv_heads, scale, window);
    require(hidden > 0 && hidden % kLanes == 0 && ffn > 0 && ffn % kLanes == 0, "widths must be multiples of 16");
    require(!norms[3].is_none(), "the norm before the MLP is missing");
    BoundLayer out;
    DecoderLayer& layer = out.layer;
    const int dim = kv.k.dim;
    layer.kv = kv;
    layer.qkv = product_of(nb::cast<nb::tuple>(linears[0]), hidden, (heads + 2 * kv.kv_heads) * dim, out);
    layer.o = product_of(nb::cast<nb::tuple>(linears[1]), heads * dim, hidden, out);
    layer.gate_up = product_of(nb::cast<nb::tuple>(linears[2]), hidden, 2 * ffn, out);
    layer.down = product_of(nb::cast<nb::tuple>(linears[3]), ffn, hidden, out);
    layer.dtype = dtype_of(nb::cast<Tensor>(norms[3]), "norm weight");
    layer.q_norm = norm_weight(norms[0], dim, layer.dtype, out);
    layer.k_norm = norm_weight(norms[1], dim, layer.dtype, out);
    layer.attention_output_norm = norm_weight(norms[2], hidden, layer.dtype, out);
    layer.mlp_norm = norm_weight(norms[3], hidden, layer.dtype, out);
    layer.mlp_output_norm = norm_weight(norms[4], hidden, layer.dtype, out);
    if (!cos.is_none()) {
        const auto c = nb::cast<Floats>(cos), s = nb::cast<Floats>(sin);
        const int64_t half = int64_t(c.shape(1));
        require(2 * half <= dim && 2 * half % kLanes == 0, "rotated dimensions must be a multiple of 16, at most the head");
        require(s.shape(0) == c.shape(0) && s.shape(1) == c.shape(1), "cos and sin must have one shape");
        layer.cos = c.data();
        layer.sin = s.data();
        layer.rotary_dim = int(2 * half);
        out.num_positions = int64_t(c.shape(0));
        out.kept.emplace_back(c.handle());
        out.kept.emplace_back(s.handle());
    }
    layer.heads = heads;
    layer.hidden = hidden;
    layer.window = window;
    layer.scale = scale;
    layer.eps = eps;
    layer.add_one = add_one;
    layer.gelu = gelu;
    return out;
}

void require_rows(const Tensor& x, int64_t rows, int64_t width, Dtype dtype, const char* name) {
    require_shape(x, {rows, width}, name);
    require_dtype(x, dtype, name);
    require_contiguous(x, name);
}

void bind_project(const BoundLayer& bound, Tensor x, Longs positions, Longs slots, Arena arena, Tensor qkv,
                  int num_threads) {
    const DecoderLayer& layer = bound.layer;
    const int64_t rows = int64_t(positions.shape(0));
    require_arena(arena, layer.kv);
    require_rows(x, rows, layer.hidden, layer.dtype, "x");
    require_rows(qkv, rows, layer.qkv.outputs, layer.dtype, "qkv");
    require(int64_t(slots.shape(0)) == rows, "slots must have one entry per row");
    const int64_t num_slots = int64_t(arena.shape(0)) * layer.kv.block_size;
    for (int64_t r = 0; r < rows; ++r) {
        require(slots.data()[r] >= 0 && slots.data()[r] < num_slots, "slot outside the arena");
        const bool inside = positions.data()[r] >= 0 && positions.data()[r] < bound.num_positions;
        require(!layer.cos || inside, "position outside the tables");
    }
    if (rows == 0) return;
    nb::gil_scoped_release release;
    project(layer, x.data(), rows, positions.data(), slots.data(), arena.data(), qkv.data(),
            num_threads < 1 ? 1 : num_threads);
}

void bind_complete(const BoundLayer& bound, Arena arena, Tensor q, Ints row_offsets, Ints starts, Table page_table,
                   Tensor residual, Tensor next_norm, Tensor out, int num_threads) {
    const DecoderLayer& layer = bound.layer;
    require(q.ndim() == 3, "q must be [rows, heads, dim]");
    const int64_t rows = int64_t(q.shape(0)), chunks = int64_t(starts.shape(0));
    require_arena(arena, layer.kv);
    require_shape(q, {rows, layer.heads, layer.kv.k.dim}, "q");
    require_dtype(q, layer.dtype, "q");
    require_rows(residual, rows, layer.hidden, layer.dtype, "residual");
    require_rows(out, rows, layer.hidden, layer.dtype, "out");
    require_shape(next_norm, {layer.hidden}, "next_norm");
    require_dtype(next_norm, layer.dtype, "next_norm");
    require(next_norm.stride(0) == 1, "next_norm must be contiguous");
    require_table(row_offsets, starts, page_table, layer.kv.block_size);
    if (rows == 0) return;
    const AttendArgs args{arena.data(), &layer.kv, q.data(), row_stride(q, "q"), nullptr, layer.dtype, layer.heads,
                          row_offsets.data(), starts.data(), page_table.data(), int(chunks), int(page_table.shape(1)),
                          layer.scale, layer.window};
    require_chunks(args, rows, int64_t(arena.shape(0)));
    nb::gil_scoped_release release;
    complete(layer, args, rows, residual.data(), next_norm.data(), out.data(), num_threads < 1 ? 1 : num_threads);
}

}  // namespace

void bind_layers(nb::module_& m) {
    nb::class_<BoundLayer>(m, "DecoderLayer", "A layer whose linear layers are all quantized.")
        .def_static("make", &make_decoder_layer, "kv"_a, "linears"_a, "norms"_a, "cos"_a.none(), "sin"_a.none(),
                    "hidden"_a, "ffn"_a, "heads"_a, "window"_a, "scale"_a, "eps"_a, "add_one"_a, "gelu"_a)
        .def("project", &bind_project, "x"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
             "arena"_a.noconvert(), "qkv"_a.noconvert(), "num_threads"_a)
        .def("complete", &bind_complete, "arena"_a.noconvert(), "q"_a.noconvert(), "row_offsets"_a.noconvert(),
             "starts"_a.noconvert(), "page_table"_a.noconvert(), "residual"_a.noconvert(), "next_norm"_a.noconvert(),
             "out"_a.noconvert(), "num_threads"_a);
}

}  // namespace dormouse

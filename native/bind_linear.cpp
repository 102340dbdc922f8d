// Bindings of the quantized linear layer.
#include "bindings.hpp"

using namespace nb::literals;

namespace dormouse {

void require_weight(const Packed& weight, int64_t outputs, int64_t inputs, int bits) {
    require(bits == 4 || bits == 8, "bits must be 4 or 8");
    require(outputs > 0 && inputs > 0 && inputs % kGroup == 0, "inputs must be a multiple of 32");
    require(outputs < (1 << 30) && inputs < (1 << 24), "the weight is too large");
    require(int64_t(weight.shape(0)) == packed_nbytes(outputs, inputs, bits), "packed has another size than its weight");
}

namespace {

double bind_pack_weight(Floats weight, int bits, Packed packed, int num_threads) {
    const int64_t outputs = int64_t(weight.shape(0)), inputs = int64_t(weight.shape(1));
    require_weight(packed, outputs, inputs, bits);
    nb::gil_scoped_release release;
    return pack_weight(weight.data(), outputs, inputs, bits, packed.data(), num_threads < 1 ? 1 : num_threads);
}

void bind_linear(Tensor x, Packed weight, int bits, nb::object bias, Tensor out, int num_threads) {
    require(x.ndim() == 2 && out.ndim() == 2, "x and out must be [rows, inputs] and [rows, outputs]");
    const int64_t rows = int64_t(x.shape(0)), inputs = int64_t(x.shape(1)), outputs = int64_t(out.shape(1));
    require_weight(weight, outputs, inputs, bits);
    require_shape(out, {rows, outputs}, "out");
    const Dtype dtype = dtype_of(x, "x");
    const Dtype out_dtype = dtype_of(out, "out");
    if (out_dtype != Dtype::F32) require_dtype(out, dtype, "out");
    require_contiguous(out, "out");
    const float* added = nullptr;
    if (!bias.is_none()) {
        auto tensor = nb::cast<Tensor>(bias);
        require_shape(tensor, {outputs}, "bias");
        require_dtype(tensor, Dtype::F32, "bias");
        require(outputs == 1 || tensor.stride(0) == 1, "bias must be contiguous");
        added = static_cast<const float*>(tensor.data());
    }
    if (rows == 0) return;
    const LinearArgs args{weight.data(), bits,  int(inputs), int(outputs), x.data(), row_stride(x, "x"),
                          added,         out.data(), dtype, out_dtype, nullptr, nullptr, nullptr};
    nb::gil_scoped_release release;
    linear(args, rows, num_threads < 1 ? 1 : num_threads);
}

}  // namespace

void bind_linears(nb::module_& m) {
    m.def("packed_nbytes", &packed_nbytes, "outputs"_a, "inputs"_a, "bits"_a);
    m.def("pack_weight", &bind_pack_weight, "weight"_a.noconvert(), "bits"_a, "packed"_a.noconvert(), "num_threads"_a,
          "Quantize; gives the relative root mean square error.");
    m.def("linear", &bind_linear, "x"_a.noconvert(), "weight"_a.noconvert(), "bits"_a, "bias"_a.none(),
          "out"_a.noconvert(), "num_threads"_a);
}

}  // namespace dormouse

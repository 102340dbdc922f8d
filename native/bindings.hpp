// What all bindings check with: nothing below them may be led outside its tensors.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "args.hpp"

namespace nb = nanobind;

namespace dormouse {

using Tensor = nb::ndarray<nb::device::cpu>;
using Arena = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void require(bool fine, const char* message) {
    if (!fine) throw nb::value_error(message);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
    const nb::dlpack::dtype dtype = tensor.dtype();
    if (dtype == nb::dtype<float>()) return Dtype::F32;
    if (dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Dtype::BF16;
    throw nb::type_error((std::string(name) + " must be float32 or bfloat16").c_str());
}

inline void require_dtype(const Tensor& tensor, Dtype dtype, const char* name) {
    if (dtype_of(tensor, name) != dtype) {
        throw nb::type_error((std::string(name) + " has another dtype than its companion").c_str());
    }
}

// Contiguous but for the first dimension, whose stride is returned.
inline int64_t row_stride(const Tensor& tensor, const char* name) {
    int64_t expected = 1;
    for (size_t i = tensor.ndim(); i-- > 1;) {
        const bool contiguous = tensor.shape(i) == 1 || tensor.stride(i) == expected;
        require(contiguous, (std::string(name) + " must be contiguous within a row").c_str());
        expected *= int64_t(tensor.shape(i));
    }
    require(tensor.shape(0) <= 1 || tensor.stride(0) >= expected, (std::string(name) + " has overlapping rows").c_str());
    return tensor.shape(0) <= 1 ? expected : tensor.stride(0);
}

inline void require_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
    bool same = tensor.ndim() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = int64_t(tensor.shape(i)) == shape[i];
    if (same) return;
    std::string message = std::string(name) + " must have the shape [";
    for (size_t i = 0; i < shape.size(); ++i) message += (i ? ", " : "") + std::to_string(shape[i]);
    throw nb::value_error((message + "]").c_str());
}

// [rows, a, b] or [rows, a]: contiguous in full.
inline void require_contiguous(const Tensor& tensor, const char* name) {
    int64_t row = 1;
    for (size_t i = 1; i < tensor.ndim(); ++i) row *= int64_t(tensor.shape(i));
    require(row_stride(tensor, name) == row, (std::string(name) + " must be contiguous").c_str());
}

using Packed = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline void require_arena(const Arena& arena, const Layer& layer) {
    require(int64_t(arena.shape(1)) == layer.block_nbytes, "arena must be [num_pages, block_nbytes]");
    require(reinterpret_cast<uintptr_t>(arena.data()) % 4 == 0, "arena must be aligned to 4 bytes");
}

inline void require_attention(int64_t heads, int kv_heads, float scale, int window) {
    require(heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
    require(heads / kv_heads <= 1024, "more than 1024 query heads per kv head");
    require(scale > 0.0f && scale < 1e30f, "scale must be positive");
    require(window >= 0, "window must not be negative");
}

inline void require_table(const Ints& row_offsets, const Ints& starts, const Table& page_table, int block_size) {
    require(row_offsets.shape(0) == starts.shape(0) + 1, "row_offsets must have one entry more than starts");
    require(page_table.shape(0) == starts.shape(0), "page_table must have one row per chunk");
    require(int64_t(page_table.shape(1)) * block_size < (int64_t(1) << 30), "page_table is too wide");
}

// Every page that a chunk will read is in the table and in the arena.
inline void require_chunks(const AttendArgs& args, int64_t rows, int64_t num_pages) {
    require(args.row_offsets[0] == 0 && args.row_offsets[args.num_chunks] == rows,
            "row_offsets must run from 0 to the number of rows");
    const int block = args.layer->block_size;
    for (int i = 0; i < args.num_chunks; ++i) {
        const int64_t tokens = int64_t(args.row_offsets[i + 1]) - args.row_offsets[i], start = args.starts[i];
        require(tokens >= 0, "row_offsets must not decrease");
        require(start >= 0 && start + tokens <= int64_t(args.max_pages) * block, "page_table is too short for a chunk");
        if (tokens == 0) continue;
        const int64_t first = args.window ? (start - args.window + 1 > 0 ? start - args.window + 1 : 0) : 0;
        for (int64_t p = first / block; p <= (start + tokens - 1) / block; ++p) {
            const int32_t page = args.page_table[int64_t(i) * args.max_pages + p];
            require(page >= 0 && page < num_pages, "page_table names a page outside the arena");
        }
    }
}

void require_weight(const Packed& weight, int64_t outputs, int64_t inputs, int bits);

// bind_linear.cpp and bind_layer.cpp
void bind_linears(nb::module_& m);
void bind_layers(nb::module_& m);

}  // namespace dormouse

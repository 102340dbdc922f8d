// What the kernels are told: plain structs shared by the bindings, the task loops and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dormouse {

constexpr int kLanes = 16;  // floats in a vector, on every instruction set: so layouts and orders are one
constexpr int kTile = 128;  // keys that are dequantized together; aligned at position 0
constexpr int kSplit = 512;  // keys after which a partial result is merged; aligned at position 0
constexpr int kMaxHeadDim = 512;

enum class Dtype { F32, BF16 };

// The K or the V half of a layer: offsets in bytes from the page's start.
struct Half {
    int bits = 0;
    int dim = 0;
    int64_t data = 0;
    int64_t scales = 0;
    int64_t biases = 0;
};

struct Layer {
    Half k, v;
    int kv_heads = 0;
    int block_size = 0;
    int group_size = 0;
    int64_t block_nbytes = 0;
};

// Strides are in values from one row to the next; within a row everything is contiguous.

// k and v: [rows, kv_heads, dim]; slots: [rows], all different.
struct WriteArgs {
    uint8_t* arena;
    const Layer* layer;
    const void* k;
    const void* v;
    int64_t k_stride;
    int64_t v_stride;
    Dtype dtype;
    const int64_t* slots;
};

// q: [rows, heads, k.dim]; out: [rows, heads, v.dim]; page_table: [chunks, max_pages].
struct AttendArgs {
    const uint8_t* arena;
    const Layer* layer;
    const void* q;
    int64_t q_stride;
    void* out;
    Dtype dtype;
    int heads;
    const int32_t* row_offsets;
    const int32_t* starts;
    const int32_t* page_table;
    int num_chunks;
    int max_pages;
    float scale;
    int window;  // 0: none
};

// Tokens of one chunk for one kv head. `split` >= 0: only the keys of that split, result to `partial`.
struct Task {
    int chunk;
    int kv_head;
    int token;
    int num_tokens;
    int split;
    float* partial;
};

struct NormArgs {
    const void* x;
    void* residual;  // null: none; else x is added to it, in place, before the norm
    const void* weight;
    void* out;
    Dtype dtype;
    int dim;
    float eps;
    bool add_one;  // weights are stored as their difference from one
};

struct RopeArgs {
    void* x;  // [rows, heads, dim], rotated in place
    int64_t stride;
    const float* cos;  // [positions, rotary_dim / 2]
    const float* sin;
    const int64_t* positions;  // [rows]
    Dtype dtype;
    int heads;
    int dim;
    int rotary_dim;
};

struct GateArgs {
    const void* gate_up;  // [rows, 2 * ffn]
    void* out;            // [rows, ffn]
    Dtype dtype;
    int ffn;
    bool gelu;
};

// The kernels of one instruction set. Row ranges are [begin, end).
struct Kernels {
    const char* name;
    size_t (*attend_scratch)(const Layer&, int rows);  // bytes
    size_t (*partial_floats)(const Layer&, int rows);
    void (*attend)(const AttendArgs&, const Task&, void* scratch);
    void (*merge)(const AttendArgs&, const Task* splits, int num_splits, void* scratch);
    void (*write)(const WriteArgs&, int64_t begin, int64_t end);
    void (*norm)(const NormArgs&, int64_t begin, int64_t end);
    void (*rope)(const RopeArgs&, int64_t begin, int64_t end);
    void (*gate)(const GateArgs&, int64_t begin, int64_t end);
};

// dispatch.cpp: the instruction sets that this machine runs, best first, and the one in use.
int num_isas();
const Kernels& isa_at(int index);
const Kernels& kernels();
bool use_isa(const char* name);

// Memory of the calling thread, 64-byte aligned, kept until the thread ends; `slot` 0 or 1.
void* scratch(int slot, size_t nbytes);

void write_kv(const WriteArgs&, int64_t rows, int num_threads);
void attend(const AttendArgs&, int num_threads);
void norm(const NormArgs&, int64_t rows, int num_threads);
void rope(const RopeArgs&, int64_t rows, int num_threads);
void gate(const GateArgs&, int64_t rows, int num_threads);

}  // namespace dormouse

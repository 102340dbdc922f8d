// What the kernels are told: plain structs shared by the bindings, the task loops and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dormouse {

constexpr int kLanes = 16;  // floats in a vector, on every instruction set: so layouts and orders are one
constexpr int kTile = 128;  // keys that are dequantized together; aligned at position 0
constexpr int kSplit = 512;  // keys after which a partial result is merged; aligned at position 0
constexpr int kMaxHeadDim = 512;

constexpr int kPanel = 32;                              // outputs of a weight that are computed together
constexpr int kGroup = 32;                              // inputs that share a scale
constexpr int kBlock8 = kPanel * kGroup + 2 * kPanel;      // bytes of a group of a panel: numbers, scales
constexpr int kBlock4 = kPanel * kGroup / 2 + 4 * kPanel;  // numbers, scales, minima

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

// x: [rows, inputs]; out: [rows, outputs]; weight as in linear.hpp. The last three are working memory.
struct LinearArgs {
    const uint8_t* weight;
    int bits;
    int inputs;
    int outputs;
    const void* x;
    int64_t x_stride;
    const float* bias;  // [outputs] or null
    void* out;
    Dtype dtype;      // of x
    Dtype out_dtype;  // that of x, or fp32
    float* scales;   // [rows, inputs / kGroup]
    uint32_t* sums;  // [rows, inputs / kGroup]: whole numbers for 8 bits, floats for 4
    int8_t* q;       // [rows, inputs]
};

// A quantized linear layer.
struct Product {
    const uint8_t* weight;
    int bits;
    int inputs;
    int outputs;
    const float* bias;  // or null
};

// A whole layer of a decoder; norms are of its dtype, and null where the model has none.
struct DecoderLayer {
    Layer kv;
    Product qkv, o, gate_up, down;
    const void* q_norm;
    const void* k_norm;
    const void* attention_output_norm;
    const void* mlp_norm;
    const void* mlp_output_norm;
    const float* cos;  // [positions, rotary_dim / 2], or null: no rotation
    const float* sin;
    int rotary_dim;
    int heads;
    int hidden;
    int window;  // 0: none
    float scale;
    float eps;
    bool add_one;
    bool gelu;
    Dtype dtype;
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
    size_t (*linear_scratch)(const LinearArgs&);  // bytes
    void (*quantize)(const LinearArgs&, int64_t begin, int64_t end);
    void (*product)(const LinearArgs&, int panel, int64_t begin, int64_t end, void* scratch);
};

// dispatch.cpp: the instruction sets that this machine runs, best first, and the one in use.
int num_isas();
const Kernels& isa_at(int index);
const Kernels& kernels();
bool use_isa(const char* name);

// Memory of the calling thread, page aligned, kept until the thread ends. Slot 0 is of tasks, 1 of the kernel
// that cuts them, from 2 on of the layer that calls kernels.
constexpr int kScratchSlots = 5;
void* scratch(int slot, size_t nbytes);

void write_kv(const WriteArgs&, int64_t rows, int num_threads);
void attend(const AttendArgs&, int num_threads);
void norm(const NormArgs&, int64_t rows, int num_threads);
void rope(const RopeArgs&, int64_t rows, int num_threads);
void gate(const GateArgs&, int64_t rows, int num_threads);

int64_t packed_nbytes(int64_t outputs, int64_t inputs, int bits);
// weight: [outputs, inputs]. Returns the root mean square of the rounding errors over that of the weights.
double pack_weight(const float* weight, int64_t outputs, int64_t inputs, int bits, uint8_t* packed, int num_threads);
// The first half of a layer, up to the KV: q is left in `qkv`, [rows, outputs of qkv], normed and rotated.
void project(const DecoderLayer&, const void* x, int64_t rows, const int64_t* positions, const int64_t* slots,
             uint8_t* arena, void* qkv, int num_threads);
// The second half, from attention on. `args` has all but what the layer knows. `residual` [rows, hidden] is added
// to in place; `out` [rows, hidden] is its norm by `next_norm`.
void complete(const DecoderLayer&, AttendArgs args, int64_t rows, void* residual, const void* next_norm, void* out,
              int num_threads);
// The working memory of `args` is allocated here.
void linear(LinearArgs args, int64_t rows, int num_threads);

}  // namespace dormouse

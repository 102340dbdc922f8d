// One task of attention: rows of one chunk and one kv head over their keys, split by split, tile by tile.
#pragma once

#include "block.hpp"
#include "quantize.hpp"

namespace dormouse::DORMOUSE_ISA {

// The task's scratch: [State part | State total | queries | K tile | V tile | scores | weights | spans].
struct Scratch {
    State part, total;
    uint32_t* q;
    uint32_t* k;
    uint32_t* v;
    float* scores;
    uint32_t* weights;
    Span* spans;

    static size_t state_floats(const Layer& layer, int rows) {
        return size_t(round_up(int(State::num_floats(rows, layer.v.dim)), kLanes));
    }
    static size_t nbytes(const Layer& layer, int rows) {
        const size_t words = 2 * state_floats(layer, rows) + size_t(rows) * size_t(layer.k.dim) +
                             size_t(kTile) * size_t(layer.k.dim + layer.v.dim) + 2 * kBlockRows * kTile +
                             2 * kBlockRows;
        return words * sizeof(uint32_t);
    }
    Scratch(const Layer& layer, int rows, void* memory) {
        auto* floats = static_cast<float*>(memory);
        part = State::at(floats, rows);
        total = State::at(floats + state_floats(layer, rows), rows);
        scores = floats + 2 * state_floats(layer, rows);
        q = reinterpret_cast<uint32_t*>(scores + kBlockRows * kTile);
        k = q + size_t(rows) * size_t(layer.k.dim);
        v = k + size_t(kTile) * size_t(layer.k.dim);
        weights = v + size_t(kTile) * size_t(layer.v.dim);
        spans = reinterpret_cast<Span*>(weights + kBlockRows * kTile);
    }
};

inline void clear(State state, int rows, int v_dim) {
    for (int r = 0; r < rows; ++r) state.m[r] = kNoScore;
    std::memset(state.l, 0, sizeof(float) * size_t(rows) * kLanes);
    std::memset(state.o, 0, sizeof(float) * size_t(rows) * size_t(v_dim));
}

// Adds the keys of a later split to `total`. A row that saw none of them stays as it is.
inline void merge_state(State total, State part, int rows, int v_dim, float scale) {
    for (int r = 0; r < rows; ++r) {
        if (part.m[r] == kNoScore) continue;
        const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
        const F old_factor = set(exp2((total.m[r] - m) * scale)), factor = set(exp2((part.m[r] - m) * scale));
        total.m[r] = m;
        for (int i = 0; i < kLanes + v_dim; i += kLanes) {
            float* to = i ? total.o + r * v_dim + i - kLanes : total.l + r * kLanes;
            const float* from = i ? part.o + r * v_dim + i - kLanes : part.l + r * kLanes;
            store(to, fma(load(from), factor, mul(load(to), old_factor)));
        }
    }
}

struct Job {
    const AttendArgs& args;
    const Task& task;
    int group;     // query heads per kv head
    int rows;      // group * num_tokens, token by token
    int position;  // of the first token
    int last;      // of the last token
    int first_key;
    float scale;

    Job(const AttendArgs& a, const Task& t) : args(a), task(t) {
        group = a.heads / a.layer->kv_heads;
        rows = group * t.num_tokens;
        position = a.starts[t.chunk] + t.token;
        last = position + t.num_tokens - 1;
        first_key = a.window ? most(0, position - a.window + 1) : 0;
        scale = a.scale * 1.44269504088896341f;
    }
    int64_t row_of(int token) const { return int64_t(args.row_offsets[task.chunk]) + task.token + token; }
    int64_t first_head() const { return int64_t(task.kv_head) * group; }
    Span span(int row, int tile) const {
        const int at = position + row / group - tile;
        return {args.window ? most(0, at - args.window + 1) : 0, least(kTile, at + 1)};
    }
};

// Rows next to each other, so that a block walks one stream, in the words of the products.
template <Math M>
void gather_queries(const Job& job, uint32_t* out) {
    const int dim = job.args.layer->k.dim;
    const size_t words = size_t(job.group) * size_t(dim) / per_word(M);
    for (int t = 0; t < job.task.num_tokens; ++t, out += words) {
        const int64_t from = job.row_of(t) * job.args.q_stride + job.first_head() * dim;
        if constexpr (M == Math::Pairs) {
            std::memcpy(out, static_cast<const uint16_t*>(job.args.q) + from, words * 4);
        } else {
            load_row(job.args.q, job.args.dtype, from, job.group * dim, reinterpret_cast<float*>(out));
        }
    }
}

template <Math M>
void attend_tile(const Job& job, const Scratch& s, int tile) {
    const Layer& layer = *job.args.layer;
    const int q_words = layer.k.dim / per_word(M);
    const int32_t* pages = job.args.page_table + int64_t(job.task.chunk) * job.args.max_pages;
    const int begin = most(0, job.first_key - tile) / kLanes * kLanes;
    const int end = least(kTile, job.last + 1 - tile);
    load_keys<M>({job.args.arena, pages, &layer, &layer.k, job.task.kv_head}, tile, begin, end, s.k);
    load_values<M>({job.args.arena, pages, &layer, &layer.v, job.task.kv_head}, tile, begin, end, s.v);
    const int blocks = (job.rows + kBlockRows - 1) / kBlockRows;
    for (int i = 0; i < blocks; ++i) {
        const int row = int(int64_t(job.rows) * i / blocks), rows = int(int64_t(job.rows) * (i + 1) / blocks) - row;
        for (int r = 0; r < rows; ++r) s.spans[r] = job.span(row + r, tile);
        const Span keys{s.spans[0].begin, s.spans[rows - 1].end};
        if (keys.begin >= keys.end) continue;
        const State at{s.part.m + row, s.part.l + row * kLanes, s.part.o + row * layer.v.dim};
        attend_block<M>({s.q + row * q_words, s.k, s.v, s.spans, keys, s.scores, s.weights, at, q_words,
                         layer.v.dim, job.scale},
                        rows);
    }
}

template <Math M>
void attend_split(const Job& job, const Scratch& s, int split) {
    clear(s.part, job.rows, job.args.layer->v.dim);
    const int begin = most(split * kSplit, job.first_key / kTile * kTile);
    const int end = least((split + 1) * kSplit, job.last + 1);
    for (int tile = begin; tile < end; tile += kTile) attend_tile<M>(job, s, tile);
}

// The weighted sum over the weights' sum. Adding zero turns -0 into 0: the sign of a sum of nothing but masked
// keys' zeros would depend on how many there were.
inline void finish(const Job& job, State total) {
    const int dim = job.args.layer->v.dim;
    for (int r = 0; r < job.rows; ++r) {
        const F inverse = set(1.0f / reduce_add(load(total.l + r * kLanes)));
        const int64_t head = job.first_head() + r % job.group;
        const int64_t to = (job.row_of(r / job.group) * job.args.heads + head) * dim;
        for (int d = 0; d < dim; d += kLanes) {
            const F x = add(mul(load(total.o + r * dim + d), inverse), zero());
            if (job.args.dtype == Dtype::F32) {
                store(static_cast<float*>(job.args.out) + to + d, x);
            } else {
                store_bf16(static_cast<uint16_t*>(job.args.out) + to + d, x);
            }
        }
    }
}

template <Math M>
void attend_task(const AttendArgs& args, const Task& task, void* memory) {
    const Job job(args, task);
    const int v_dim = args.layer->v.dim;
    Scratch s(*args.layer, job.rows, memory);
    gather_queries<M>(job, s.q);
    if (task.split >= 0) {
        s.part = State::at(task.partial, job.rows);
        return attend_split<M>(job, s, task.split);
    }
    clear(s.total, job.rows, v_dim);
    for (int split = job.first_key / kSplit; split <= job.last / kSplit; ++split) {
        attend_split<M>(job, s, split);
        merge_state(s.total, s.part, job.rows, v_dim, job.scale);
    }
    finish(job, s.total);
}

inline void attend(const AttendArgs& args, const Task& task, void* memory) {
    if (args.dtype == Dtype::F32) return attend_task<Math::Float>(args, task, memory);
    if constexpr (kPairs) {
        return attend_task<Math::Pairs>(args, task, memory);
    } else {
        return attend_task<Math::Bf16>(args, task, memory);
    }
}

// The splits of one task, computed apart: the same merges in the same order.
inline void merge(const AttendArgs& args, const Task* splits, int num_splits, void* memory) {
    const Job job(args, splits[0]);
    const State total = Scratch(*args.layer, job.rows, memory).total;
    clear(total, job.rows, args.layer->v.dim);
    for (int i = 0; i < num_splits; ++i) {
        merge_state(total, State::at(splits[i].partial, job.rows), job.rows, args.layer->v.dim, job.scale);
    }
    finish(job, total);
}

}  // namespace dormouse::DORMOUSE_ISA

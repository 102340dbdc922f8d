// Threads over rows for the kernels that treat every row alike.
#include "rows.hpp"

namespace dormouse {

void write_kv(const WriteArgs& args, int64_t rows, int num_threads) {
    const Kernels& isa = kernels();
    const int64_t width = int64_t(args.layer->kv_heads) * (args.layer->k.dim + args.layer->v.dim);
    over_rows(rows, grain_for(width), num_threads, [&](int64_t begin, int64_t end) { isa.write(args, begin, end); });
}

void norm(const NormArgs& args, int64_t rows, int num_threads) {
    const Kernels& isa = kernels();
    over_rows(rows, grain_for(args.dim), num_threads, [&](int64_t begin, int64_t end) { isa.norm(args, begin, end); });
}

void rope(const RopeArgs& args, int64_t rows, int num_threads) {
    const Kernels& isa = kernels();
    const int64_t width = int64_t(args.heads) * args.dim;
    over_rows(rows, grain_for(width), num_threads, [&](int64_t begin, int64_t end) { isa.rope(args, begin, end); });
}

void gate(const GateArgs& args, int64_t rows, int num_threads) {
    const Kernels& isa = kernels();
    over_rows(rows, grain_for(args.ffn), num_threads, [&](int64_t begin, int64_t end) { isa.gate(args, begin, end); });
}

}  // namespace dormouse

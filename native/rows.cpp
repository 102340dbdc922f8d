// Threads over rows for the kernels that treat every row alike.
#include "args.hpp"

namespace dormouse {

namespace {

// Splits rows evenly; a thread gets at least `grain` rows, since waking one costs microseconds.
template <class Run>
void over_rows(int64_t rows, int64_t grain, int num_threads, Run run) {
    const int64_t wanted = (rows + grain - 1) / grain;
    const int parts = int(wanted < num_threads ? wanted : num_threads);
    if (parts <= 1) return run(0, rows);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int i = 0; i < parts; ++i) run(rows * i / parts, rows * (i + 1) / parts);
}

int64_t grain_for(int64_t values_per_row) { return 1 + 16384 / (values_per_row + 1); }

}  // namespace

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

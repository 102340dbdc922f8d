// Threads over rows that are treated alike.
#pragma once

#include "args.hpp"
#include "pool.hpp"

namespace dormouse {

// Splits rows evenly; a thread gets at least `grain` rows, since waking one costs microseconds.
template <class Run>
void over_rows(int64_t rows, int64_t grain, int num_threads, Run run) {
    const int64_t wanted = (rows + grain - 1) / grain;
    const int parts = int(wanted < num_threads ? wanted : num_threads);
    if (parts <= 1) return run(0, rows);
    parallel_for(parts, parts, [&](int64_t i) { run(rows * i / parts, rows * (i + 1) / parts); });
}

inline int64_t grain_for(int64_t values_per_row) { return 1 + 16384 / (values_per_row + 1); }

}  // namespace dormouse

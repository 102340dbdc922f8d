// Cuts a call into tasks and gives them to threads. How it cuts changes no bit of the result.
#include <algorithm>
#include <vector>

#include "args.hpp"
#include "pool.hpp"

namespace dormouse {

namespace {

constexpr int kRowsPerTask = 384;    // queries that share a dequantized tile, while their sums stay in L2
constexpr int kTasksPerThread = 4;   // below that, a chunk's keys are split among tasks too
constexpr int kSplitRows = 32;       // only tasks of few rows: partial results cost memory

struct Tasks {
    std::vector<Task> whole;   // also the splits
    std::vector<std::pair<int, int>> merges;  // ranges of `whole` that are splits of one task
};

int64_t num_keys(const AttendArgs& args, const Task& task) {
    const int64_t last = int64_t(args.starts[task.chunk]) + task.token + task.num_tokens;
    return args.window ? std::min<int64_t>(last, args.window + task.num_tokens) : last;
}

std::vector<Task> row_tasks(const AttendArgs& args) {
    const int group = args.heads / args.layer->kv_heads;
    const int step = std::max(1, kRowsPerTask / group);
    std::vector<Task> tasks;
    for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
        const int tokens = args.row_offsets[chunk + 1] - args.row_offsets[chunk];
        const int parts = (tokens + step - 1) / step;
        // From the chunk's end: its later rows have more keys, and long tasks should start first.
        for (int i = parts - 1; i >= 0; --i) {
            const int begin = int(int64_t(tokens) * i / parts), end = int(int64_t(tokens) * (i + 1) / parts);
            for (int head = 0; head < args.layer->kv_heads; ++head) {
                tasks.push_back({chunk, head, begin, end - begin, -1, nullptr});
            }
        }
    }
    return tasks;
}

// Splits tasks of few rows and many keys when there are too few tasks to keep the threads even.
Tasks split_tasks(const AttendArgs& args, std::vector<Task> rows, int num_threads) {
    const int group = args.heads / args.layer->kv_heads;
    Tasks tasks;
    const bool enough = num_threads == 1 || int(rows.size()) >= kTasksPerThread * num_threads;
    for (const Task& task : rows) {
        const int position = args.starts[task.chunk] + task.token;
        const int first = args.window ? std::max(0, position - args.window + 1) / kSplit : 0;
        const int last = (position + task.num_tokens - 1) / kSplit;
        if (enough || first == last || task.num_tokens * group > kSplitRows) {
            tasks.whole.push_back(task);
            continue;
        }
        const int begin = int(tasks.whole.size());
        for (int split = first; split <= last; ++split) {
            tasks.whole.push_back(task);
            tasks.whole.back().split = split;
        }
        tasks.merges.emplace_back(begin, int(tasks.whole.size()));
    }
    return tasks;
}

// Memory for the partial results, of the calling thread.
void place_partials(const AttendArgs& args, const Kernels& isa, Tasks& tasks) {
    const int group = args.heads / args.layer->kv_heads;
    size_t floats = 0;
    for (const Task& task : tasks.whole) {
        if (task.split >= 0) floats += isa.partial_floats(*args.layer, task.num_tokens * group);
    }
    if (floats == 0) return;
    float* next = static_cast<float*>(scratch(1, floats * sizeof(float)));
    for (Task& task : tasks.whole) {
        if (task.split < 0) continue;
        task.partial = next;
        next += isa.partial_floats(*args.layer, task.num_tokens * group);
    }
}

}  // namespace

void attend(const AttendArgs& args, int num_threads) {
    const Kernels& isa = kernels();
    const int group = args.heads / args.layer->kv_heads;
    std::vector<Task> rows = row_tasks(args);
    int64_t work = 0;
    int most_rows = 0;
    for (const Task& task : rows) {
        work += num_keys(args, task) * (32 + task.num_tokens * group);
        most_rows = std::max(most_rows, task.num_tokens * group);
    }
    // Waking threads costs microseconds: a call of a few of them runs on one.
    if (work < 16384) num_threads = 1;
    Tasks tasks = split_tasks(args, std::move(rows), num_threads);
    place_partials(args, isa, tasks);
    const size_t nbytes = isa.attend_scratch(*args.layer, most_rows);
    const int num_tasks = int(tasks.whole.size());
    parallel_for(num_tasks, num_threads,
                 [&](int64_t i) { isa.attend(args, tasks.whole[size_t(i)], scratch(0, nbytes)); });
    for (const auto& [begin, end] : tasks.merges) {
        isa.merge(args, &tasks.whole[size_t(begin)], end - begin, scratch(0, nbytes));
    }
}

}  // namespace dormouse

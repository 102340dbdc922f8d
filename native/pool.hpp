// Threads that share a loop, and a caller who waits for none that has not begun.
//
// A step runs some two hundred loops of microseconds. OpenMP ends each with a barrier of all its threads: one
// that the system has given to another program's work holds up every loop, and a step beside a busy neighbour
// took fifteen times as long. Here the caller takes tasks as the workers do. Whoever is awake works, and at the
// end the caller waits only for tasks that were taken.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>

namespace dormouse {

class Pool {
public:
    using Task = void (*)(const void* body, int64_t task);

    // Runs tasks 0 to count - 1, each once and in no order, on the caller and on `num_threads` - 1 workers, or
    // more where an earlier call asked for more. Of two callers at once the second runs its tasks alone. Throws std::bad_alloc when a task did, after all
    // of them ended; a task must throw nothing else.
    void run(int64_t count, int num_threads, Task task, const void* body);

private:
    bool take(int64_t& task);
    bool work();
    void start(int workers);
    void serve();
    bool idle();

    std::mutex caller_;  // held for the length of a run
    // The loop that runs. Written while no task is left; read by who took a task, and the loop lasts until it ends.
    Task task_ = nullptr;
    const void* body_ = nullptr;
    int64_t count_ = 0;
    std::atomic<bool> out_of_memory_{false};
    int workers_ = 0;

    alignas(64) std::atomic<int64_t> left_{0};  // tasks that nobody took
    alignas(64) std::atomic<int64_t> ended_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex bed_;
    std::condition_variable wake_;
};

Pool& pool();

// `body(task)` for tasks 0 to count - 1. See `Pool::run`.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
    pool().run(
        count, num_threads, [](const void* b, int64_t task) { (*static_cast<const Body*>(b))(task); }, &body);
}

}  // namespace dormouse

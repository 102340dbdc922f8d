#include "pool.hpp"

#include <chrono>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#endif

namespace dormouse {

namespace {

// A worker stays awake over the microseconds between two loops of a step, and sleeps between steps.
constexpr auto kAwake = std::chrono::microseconds(100);
constexpr int kSpins = 200;  // some microseconds of `relax`

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Signals are the program's business, not the workers'.
class SignalsBlocked {
public:
#if defined(__unix__) || defined(__APPLE__)
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
#endif
};

}  // namespace

Pool& pool() {
    static Pool* const pool = new Pool;  // never destroyed: its workers end with the process
    return *pool;
}

void Pool::run(int64_t count, int num_threads, Task task, const void* body) {
    std::unique_lock<std::mutex> only(caller_, std::defer_lock);
    if (count <= 1 || num_threads <= 1 || !only.try_lock()) {
        for (int64_t i = 0; i < count; ++i) task(body, i);
        return;
    }
    start(num_threads - 1);
    task_ = task;
    body_ = body;
    count_ = count;
    out_of_memory_.store(false, std::memory_order_relaxed);
    ended_.store(0, std::memory_order_relaxed);
    left_.store(count);
    if (asleep_.load() > 0) {
        // Who is about to sleep holds the bed: it has seen the tasks, or it hears the call.
        std::lock_guard<std::mutex> lock(bed_);
        wake_.notify_all();
    }
    while (work()) {
    }
    for (int spins = 0; ended_.load(std::memory_order_acquire) < count; ++spins) {
        // The worker may be waiting for this very core.
        spins < kSpins ? relax() : std::this_thread::yield();
    }
    if (out_of_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

bool Pool::take(int64_t& task) {
    int64_t left = left_.load(std::memory_order_relaxed);
    while (left > 0) {
        if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
            task = count_ - left;
            return true;
        }
    }
    return false;
}

bool Pool::work() {
    int64_t task;
    if (!take(task)) return false;
    try {
        task_(body_, task);
    } catch (const std::bad_alloc&) {
        out_of_memory_.store(true, std::memory_order_relaxed);
    }
    ended_.fetch_add(1, std::memory_order_release);
    return true;
}

void Pool::start(int workers) {
    const SignalsBlocked blocked;
    for (; workers_ < workers; ++workers_) {
        try {
            std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            return;  // no thread is to be had now: those that are here do the work
        }
    }
}

void Pool::serve() {
    for (;;) {
        while (work()) {
        }
        if (!idle()) continue;
        std::unique_lock<std::mutex> lock(bed_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [this] { return left_.load() > 0; });
        asleep_.fetch_sub(1);
    }
}

// Waits awake for a while; whether nothing came.
bool Pool::idle() {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    do {
        for (int i = 0; i < kSpins; ++i) {
            if (left_.load(std::memory_order_relaxed) > 0) return false;
            relax();
        }
    } while (std::chrono::steady_clock::now() < until);
    return true;
}

}  // namespace dormouse

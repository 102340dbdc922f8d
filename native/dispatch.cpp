// Which instruction set runs, and scratch memory. Built for the baseline: nothing here needs more.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "args.hpp"

namespace dormouse {

namespace portable {
extern const Kernels table;
}
#ifdef DORMOUSE_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Available {
    const Kernels* tables[5];
    int count = 0;

    Available() {
#ifdef DORMOUSE_X86
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
        if (vnni && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512bf16::table;
        if (vnni) tables[count++] = &avx512vnni::table;
        if (avx512) tables[count++] = &avx512::table;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &avx2::table;
#endif
        tables[count++] = &portable::table;
    }
};

const Available& available() {
    static const Available found;
    return found;
}

std::atomic<const Kernels*> in_use{nullptr};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t capacity = 0;
};

}  // namespace

int num_isas() { return available().count; }

const Kernels& isa_at(int index) { return *available().tables[index]; }

const Kernels& kernels() {
    const Kernels* chosen = in_use.load(std::memory_order_relaxed);
    return chosen ? *chosen : isa_at(0);
}

bool use_isa(const char* name) {
    for (int i = 0; i < num_isas(); ++i) {
        if (std::strcmp(isa_at(i).name, name) == 0) {
            in_use.store(&isa_at(i), std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

void* scratch(int slot, size_t nbytes) {
    // Kept per thread: fresh memory of this size would cost a page fault per 4 KiB on every call.
    thread_local Buffer buffers[kScratchSlots];
    Buffer& buffer = buffers[slot];
    if (buffer.capacity < nbytes) {
        const size_t rounded = (nbytes + 4095) / 4096 * 4096;
        buffer.memory.reset();
        buffer.capacity = 0;
        buffer.memory.reset(std::aligned_alloc(4096, rounded));
        if (!buffer.memory) throw std::bad_alloc();
        buffer.capacity = rounded;
    }
    return buffer.memory.get();
}

}  // namespace dormouse

// Weights into their packed form, and the cutting of a product into tasks.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "rows.hpp"

namespace dormouse {

namespace {

constexpr int64_t kRowsPerTask = 192;      // their activations stay in the second-level cache
constexpr int64_t kRunsPerThread = 4;      // a thread that is held up holds up this part of a product at most

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// To the nearest half, ties to even; 65504 beyond its range.
uint16_t to_f16(float x) {
    const float size = std::fabs(x);
    const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
    if (!(size < 65504.0f)) return uint16_t(sign | 0x7bff);
    if (size < 6.103515625e-5f) return uint16_t(sign | uint16_t(std::nearbyint(size * 16777216.0f)));
    const uint32_t bits = bits_of(size);
    return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1)) - (112u << 23)) >> 13);
}

float from_f16(uint16_t half) {
    const uint32_t bits = uint32_t(half & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 5.192296858534828e33f;  // 2^112: halves have another exponent bias
    return half & 0x8000 ? -x : x;
}

struct Group {
    uint8_t q[kGroup];
    uint16_t scale;
    uint16_t minimum;
};

Group quantize8(const float* w) {
    float top = 0.0f;
    for (int i = 0; i < kGroup; ++i) top = std::max(top, std::fabs(w[i]));
    Group out{};
    out.scale = to_f16(top / 127.0f);
    const float step = from_f16(out.scale), inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int i = 0; i < kGroup; ++i) {
        out.q[i] = uint8_t(128 + int(std::min(127.0f, std::max(-127.0f, std::nearbyint(w[i] * inverse)))));
    }
    return out;
}

Group quantize4(const float* w) {
    const auto [low, high] = std::minmax_element(w, w + kGroup);
    Group out{};
    out.minimum = to_f16(*low);
    const float base = from_f16(out.minimum);
    out.scale = to_f16(std::max(0.0f, (*high - base) / 15.0f));
    const float step = from_f16(out.scale), inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int i = 0; i < kGroup; ++i) {
        out.q[i] = uint8_t(std::min(15.0f, std::max(0.0f, std::nearbyint((w[i] - base) * inverse))));
    }
    return out;
}

double squared_error(const float* w, const Group& group, int bits) {
    const double scale = from_f16(group.scale), minimum = bits == 8 ? -128 * scale : from_f16(group.minimum);
    double sum = 0;
    for (int i = 0; i < kGroup; ++i) {
        const double error = w[i] - (group.q[i] * scale + minimum);
        sum += error * error;
    }
    return sum;
}

void put(const Group& group, int bits, int output, uint8_t* block) {
    const int data = kPanel * kGroup * bits / 8;
    for (int i = 0; i < kGroup; ++i) {
        const int step = i / 4, within = output * 4 + i % 4;
        if (bits == 8) {
            block[step * kPanel * 4 + within] = group.q[i];
        } else {
            block[step / 2 * kPanel * 4 + within] |= uint8_t(group.q[i] << (step % 2 * 4));
        }
    }
    std::memcpy(block + data + 2 * output, &group.scale, 2);
    if (bits == 4) std::memcpy(block + data + 2 * (kPanel + output), &group.minimum, 2);
}

}  // namespace

int64_t packed_nbytes(int64_t outputs, int64_t inputs, int bits) {
    return (outputs + kPanel - 1) / kPanel * (inputs / kGroup) * (bits == 8 ? kBlock8 : kBlock4);
}

double pack_weight(const float* weight, int64_t outputs, int64_t inputs, int bits, uint8_t* packed, int num_threads) {
    const int64_t groups = inputs / kGroup, panels = (outputs + kPanel - 1) / kPanel;
    const int64_t nbytes = bits == 8 ? kBlock8 : kBlock4;
    std::vector<double> errors(size_t(panels), 0.0), totals(size_t(panels), 0.0);
    parallel_for(panels, num_threads, [&](int64_t panel) {
        double& error = errors[size_t(panel)];
        double& total = totals[size_t(panel)];
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* block = packed + (panel * groups + g) * nbytes;
            std::memset(block, 0, size_t(nbytes));  // outputs beyond the last: scale 0
            for (int64_t n = panel * kPanel; n < std::min(outputs, (panel + 1) * kPanel); ++n) {
                const float* w = weight + n * inputs + g * kGroup;
                const Group group = bits == 8 ? quantize8(w) : quantize4(w);
                put(group, bits, int(n - panel * kPanel), block);
                error += squared_error(w, group, bits);
                for (int i = 0; i < kGroup; ++i) total += double(w[i]) * w[i];
            }
        }
    });
    const double error = std::accumulate(errors.begin(), errors.end(), 0.0);
    const double total = std::accumulate(totals.begin(), totals.end(), 0.0);
    return total > 0 ? std::sqrt(error / total) : 0.0;
}

void linear(LinearArgs args, int64_t rows, int num_threads) {
    const Kernels& isa = kernels();
    const int64_t groups = args.inputs / kGroup, num_panels = (args.outputs + kPanel - 1) / kPanel;
    auto* memory = static_cast<uint8_t*>(scratch(1, size_t(rows * (groups * 8 + args.inputs))));
    args.scales = reinterpret_cast<float*>(memory);
    args.sums = reinterpret_cast<uint32_t*>(memory + rows * groups * 4);
    args.q = reinterpret_cast<int8_t*>(memory + rows * groups * 8);
    over_rows(rows, grain_for(args.inputs), num_threads,
              [&](int64_t begin, int64_t end) { isa.quantize(args, begin, end); });
    const int64_t chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    const size_t nbytes = isa.linear_scratch(args);
    // Few rows wait for memory: each thread reads long runs of panels. Many rows compute: whoever is free goes on.
    const int64_t runs = rows <= 16 ? int64_t(num_threads) * kRunsPerThread : num_panels;
    const int64_t step = std::max<int64_t>(1, (num_panels + runs - 1) / runs);
    const int64_t tasks = (num_panels + step - 1) / step;
    parallel_for(chunks * tasks, num_threads, [&](int64_t i) {
        void* unpacked = nbytes ? scratch(0, nbytes) : nullptr;
        const int64_t chunk = i / tasks, first = i % tasks * step;
        const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
        for (int64_t panel = first; panel < std::min(num_panels, first + step); ++panel) {
            isa.product(args, int(panel), begin, end, unpacked);
        }
    });
}

}  // namespace dormouse

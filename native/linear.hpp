// Products with weights of 8 or 4 bits and activations of 8 bits, both in groups of 32 along the input.
//
// A packed weight is a row of panels of 32 outputs; a panel is one block per group:
//   8 bits: [8 steps][32 outputs][4 inputs] bytes q + 128, then [32] f16 scales;      w = q * scale
//   4 bits: the same steps, step 2i in the low and 2i + 1 in the high nibbles of [4][32][4] bytes, then [32] f16
//           scales, [32] f16 minima;                                                  w = q * scale + minimum
// Blocks are whole cache lines, read in one stream. Sums within a group are whole numbers and exact; groups are
// added in order, in one accumulator per row and output: so a row's result depends on that row alone.
#pragma once

#include "quantize.hpp"

namespace dormouse::DORMOUSE_ISA {

#if defined(__AVX512F__)
constexpr int kProductRows = 6;  // 12 sums of whole numbers and 12 of floats leave registers for the operands
#else
constexpr int kProductRows = 2;
#endif
constexpr int kPanelCols = kPanel / kLanes;
constexpr int kPanelBytes = kPanel * kGroup;

// Activations of one row, a scale for each group, and what the group's sum stands for in each output.
inline void quantize_row(const LinearArgs& args, int64_t row) {
    const int groups = args.inputs / kGroup;
    int8_t* q = args.q + row * args.inputs;
    float* scales = args.scales + row * groups;
    uint32_t* sums = args.sums + row * groups;
    for (int g = 0; g < groups; ++g) {
        const int64_t at = row * args.x_stride + g * kGroup;
        const F low = load_as(args.x, args.dtype, at), high = load_as(args.x, args.dtype, at + kLanes);
        const float top = reduce_max(max(max(low, sub(zero(), low)), max(high, sub(zero(), high))));
        const F inverse = set(top > 0.0f ? 127.0f / top : 0.0f);
        // Whatever is no number becomes one of the range here; the scale tells what it was.
        const W a = whole(max(mul(low, inverse), set(-127.0f))), b = whole(max(mul(high, inverse), set(-127.0f)));
        store_bytes(q + g * kGroup, a);
        store_bytes(q + g * kGroup + kLanes, b);
        // A NaN may not be found the greatest; x - x carries it, and infinity, into the scale.
        const float poison = reduce_add(add(sub(low, low), sub(high, high)));
        scales[g] = top / 127.0f + poison;
        const int sum = sum_of(a) + sum_of(b);
        // Eight bits are stored with 128 added to each; the minimum of four bits counts once for each input.
        sums[g] = args.bits == 8 ? uint32_t(-128 * sum) : float_bits(scales[g] * float(sum));
    }
}

// One group's block: the bytes of a step, then what scales them.
template <int Bits>
struct PanelBlock {
    const uint8_t* data;

    static constexpr int kNbytes = Bits == 8 ? kBlock8 : Bits == 4 ? kBlock4 : kBlock4 + kPanelBytes / 2;
    static constexpr int kData = Bits == 4 ? kPanelBytes / 2 : kPanelBytes;

    // `Bits` 0: four bits that were unpacked to bytes.
    void step(int i, W out[kPanelCols]) const {
        for (int c = 0; c < kPanelCols; ++c) {
            if constexpr (Bits == 4) {
                const W both = load_words(words(data + (i / 2 * kPanelCols + c) * 64));
                out[c] = nibbles(both, i % 2);
            } else {
                out[c] = load_words(words(data + (i * kPanelCols + c) * 64));
            }
        }
    }
    F scale(int c) const { return load_f16(halves(data + kData) + c * kLanes); }
    F minimum(int c) const { return load_f16(halves(data + kData) + kPanel + c * kLanes); }

    static const uint32_t* words(const uint8_t* p) { return reinterpret_cast<const uint32_t*>(p); }
    static const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }
};

template <int Bits, int R>
inline void product_rows(const LinearArgs& args, const uint8_t* panel, int64_t row, int output) {
    const int groups = args.inputs / kGroup;
    F sum[R][kPanelCols];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < kPanelCols; ++c) sum[r][c] = zero();
    }
    const int8_t* q = args.q + row * args.inputs;
    for (int g = 0; g < groups; ++g, panel += PanelBlock<Bits>::kNbytes) {
        const PanelBlock<Bits> block{panel};
        W dot[R][kPanelCols];
        for (int r = 0; r < R; ++r) {
            const W start = Bits == 8 ? set_word(args.sums[(row + r) * groups + g]) : zero_words();
            for (int c = 0; c < kPanelCols; ++c) dot[r][c] = start;
        }
        for (int i = 0; i < kGroup / 4; ++i) {
            W weight[kPanelCols];
            block.step(i, weight);
            for (int r = 0; r < R; ++r) {
                uint32_t four;
                std::memcpy(&four, q + r * int64_t(args.inputs) + g * kGroup + 4 * i, 4);
                const W x = set_word(four);
                for (int c = 0; c < kPanelCols; ++c) dot[r][c] = dot_bytes(dot[r][c], weight[c], x);
            }
        }
        F scale[kPanelCols], minimum[kPanelCols];
        for (int c = 0; c < kPanelCols; ++c) {
            scale[c] = block.scale(c);
            if constexpr (Bits != 8) minimum[c] = block.minimum(c);
        }
        for (int r = 0; r < R; ++r) {
            const int64_t at = (row + r) * groups + g;
            const F by = set(args.scales[at]);
            for (int c = 0; c < kPanelCols; ++c) {
                sum[r][c] = fma(mul(whole_floats(dot[r][c]), by), scale[c], sum[r][c]);
                if constexpr (Bits != 8) sum[r][c] = fma(minimum[c], set(bits_float(args.sums[at])), sum[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        const int64_t to = (row + r) * int64_t(args.outputs) + output;
        if (output + kPanel <= args.outputs) {
            for (int c = 0; c < kPanelCols; ++c) {
                const F bias = args.bias ? load(args.bias + output + c * kLanes) : zero();
                store_as(args.out, args.out_dtype, to + c * kLanes, add(sum[r][c], bias));
            }
            continue;
        }
        alignas(64) float last[kPanel];
        for (int c = 0; c < kPanelCols; ++c) store(last + c * kLanes, sum[r][c]);
        for (int i = 0; output + i < args.outputs; ++i) {
            const float x = last[i] + (args.bias ? args.bias[output + i] : 0.0f);
            if (args.out_dtype == Dtype::F32) {
                static_cast<float*>(args.out)[to + i] = x;
            } else {
                static_cast<uint16_t*>(args.out)[to + i] = to_bf16(x);
            }
        }
    }
}

template <int Bits, int R = kProductRows>
inline void product_some(const LinearArgs& args, const uint8_t* panel, int64_t row, int rows, int output) {
    if (rows == R) return product_rows<Bits, R>(args, panel, row, output);
    if constexpr (R > 1) product_some<Bits, R - 1>(args, panel, row, rows, output);
}

template <int Bits>
inline void product_panel(const LinearArgs& args, const uint8_t* panel, int64_t begin, int64_t end, int output) {
    const int64_t rows = end - begin, blocks = (rows + kProductRows - 1) / kProductRows;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = begin + rows * i / blocks;
        product_some<Bits>(args, panel, row, int(begin + rows * (i + 1) / blocks - row), output);
    }
}

// Nibbles to bytes, for many rows: `memory` holds the panel of blocks of PanelBlock<0>.
inline const uint8_t* unpack_panel(const uint8_t* panel, int groups, uint8_t* memory) {
    for (int g = 0; g < groups; ++g) {
        const PanelBlock<4> block{panel + g * int64_t(kBlock4)};
        uint8_t* to = memory + g * int64_t(PanelBlock<0>::kNbytes);
        for (int i = 0; i < kGroup / 4; ++i) {
            W step[kPanelCols];
            block.step(i, step);
            for (int c = 0; c < kPanelCols; ++c) {
                store_words(reinterpret_cast<uint32_t*>(to + (i * kPanelCols + c) * 64), step[c]);
            }
        }
        std::memcpy(to + PanelBlock<0>::kData, block.data + PanelBlock<4>::kData, 4 * kPanel);
    }
    return memory;
}

inline size_t linear_scratch(const LinearArgs& args) {
    return args.bits == 4 ? size_t(args.inputs / kGroup) * PanelBlock<0>::kNbytes : 0;
}

inline void quantize(const LinearArgs& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize_row(args, row);
}

// Rows [begin, end) of the outputs of one panel.
inline void product(const LinearArgs& args, int panel, int64_t begin, int64_t end, void* memory) {
    const int groups = args.inputs / kGroup;
    const uint8_t* weight = args.weight + int64_t(panel) * groups * (args.bits == 8 ? kBlock8 : kBlock4);
    const int output = panel * kPanel;
    if (args.bits == 8) return product_panel<8>(args, weight, begin, end, output);
    if (end - begin <= 2 * kProductRows) return product_panel<4>(args, weight, begin, end, output);
    product_panel<0>(args, unpack_panel(weight, groups, static_cast<uint8_t*>(memory)), begin, end, output);
}

}  // namespace dormouse::DORMOUSE_ISA

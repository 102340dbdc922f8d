// Built once per instruction set: CMake gives the flags and the namespace, DORMOUSE_ISA.
#include "attention.hpp"
#include "elementwise.hpp"
#include "linear.hpp"
#include "quantize.hpp"

#define DORMOUSE_NAME_OF(isa) #isa
#define DORMOUSE_NAME(isa) DORMOUSE_NAME_OF(isa)

namespace dormouse::DORMOUSE_ISA {

size_t attend_scratch(const Layer& layer, int rows) { return Scratch::nbytes(layer, rows); }
size_t partial_floats(const Layer& layer, int rows) { return Scratch::state_floats(layer, rows); }

extern const Kernels table;
const Kernels table{
    DORMOUSE_NAME(DORMOUSE_ISA), attend_scratch, partial_floats, attend, merge, write, norm, rope, gate,
    linear_scratch, quantize, product,
};

}  // namespace dormouse::DORMOUSE_ISA

// The kernels of one instruction set: compiled once for each, with FAMBA_ISA, FAMBA_LANES and the flags for it.
#include "conv.hpp"
#include "fuse.hpp"
#include "norm.hpp"
#include "pictures.hpp"
#include "scan_backward.hpp"

namespace famba {
namespace FAMBA_ISA {

template <class Params, void (*Float32)(const Params &), void (*BFloat16)(const Params &)>
void by_dtype(const Params &p) {
    (p.dtype == FAMBA_BFLOAT16 ? BFloat16 : Float32)(p);
}

#define FAMBA_ENTRY(name, arguments) by_dtype<arguments, name<float>, name<bf16>>,
extern const Table table = {FAMBA_KERNELS(FAMBA_ENTRY)};

}  // namespace FAMBA_ISA
}  // namespace famba

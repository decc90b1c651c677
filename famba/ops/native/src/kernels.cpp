// The kernels of one instruction set: compiled once for each, with FAMBA_ISA, FAMBA_LANES and the flags for it.
#include "conv.hpp"
#include "fuse.hpp"
#include "norm.hpp"
#include "scan_backward.hpp"
#include "table.hpp"

namespace famba {
namespace FAMBA_ISA {

template <class Params>
using Kernel = void (*)(const Params &);

template <class Params, Kernel<Params> Float32, Kernel<Params> BFloat16>
void by_dtype(const Params &p) {
    (p.dtype == FAMBA_BFLOAT16 ? BFloat16 : Float32)(p);
}

extern const Table table = {
    W,
    by_dtype<famba_scan, scan_forward<float>, scan_forward<bf16>>,
    by_dtype<famba_scan, scan_backward<float>, scan_backward<bf16>>,
    by_dtype<famba_conv, conv_forward<float>, conv_forward<bf16>>,
    by_dtype<famba_conv, conv_backward<float>, conv_backward<bf16>>,
    by_dtype<famba_norm, norm_forward<float>, norm_forward<bf16>>,
    by_dtype<famba_norm, norm_backward<float>, norm_backward<bf16>>,
    by_dtype<famba_fuse, fuse_forward<float>, fuse_forward<bf16>>,
    by_dtype<famba_fuse, fuse_backward<float>, fuse_backward<bf16>>,
};

}  // namespace FAMBA_ISA
}  // namespace famba

// What each instruction set provides.
#pragma once

#include "interface.h"

namespace famba {

struct Table {
    int lanes;
    void (*scan_forward)(const famba_scan &);
    void (*scan_backward)(const famba_scan &);
    void (*conv_forward)(const famba_conv &);
    void (*conv_backward)(const famba_conv &);
    void (*norm_forward)(const famba_norm &);
    void (*norm_backward)(const famba_norm &);
    void (*fuse_forward)(const famba_fuse &);
    void (*fuse_backward)(const famba_fuse &);
};

}  // namespace famba

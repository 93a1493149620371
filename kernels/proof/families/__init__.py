"""One module a kernel family, each with a module-level FAMILY; see kernels.proof."""

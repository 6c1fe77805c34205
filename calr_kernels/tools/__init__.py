"""Programs for those who write kernels: `aot` compiles for named GPUs, `tune` measures tiles."""

"""Programs for those who write kernels: `aot` compiles them for named GPUs."""

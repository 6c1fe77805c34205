"""The Triton kernels, one operation a file, and which of them a layer runs on (`linears`)."""

try:
    import triton  # noqa: F401 (whether it is there, and whole)
except ImportError:  # it has no build for every platform
    AVAILABLE = False
else:
    AVAILABLE = True

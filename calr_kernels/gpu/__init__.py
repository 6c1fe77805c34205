"""The Triton kernels, one operation a file, and which of them a layer runs on (`linears`)."""

try:
    from triton.language.extra.cuda import gdc_wait  # noqa: F401 (whether it is there, and whole)
except ImportError:  # it has no build for every platform
    AVAILABLE = False
else:
    AVAILABLE = True

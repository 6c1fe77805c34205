"""The Triton kernels, one a file: what runs when (`plans`), and how it is launched (`launches`)."""

try:
    import triton  # noqa: F401 (whether it is there, and whole)
except ImportError:  # it has no build for every platform
    AVAILABLE = False
else:
    AVAILABLE = True

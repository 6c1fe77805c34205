"""The Triton kernels, one a file: what runs when (`plans`), and how it is launched (`launches`)."""

from importlib.util import find_spec

AVAILABLE = find_spec("triton") is not None  # it has no build for every platform

"""What pyproject.toml cannot say: the native CPU kernel, without which everything still works."""

from glob import glob

from setuptools import Extension, setup

SOURCES = "calr_kernels/csrc"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(  # a plain shared library with a C interface, loaded with ctypes
            "calr_kernels._cpu",
            sources=sorted(glob(f"{SOURCES}/*.cpp")),
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inl")),
            language="c++",
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)

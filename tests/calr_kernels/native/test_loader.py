"""The binding declares what csrc/calr.h declares, and finds or refuses the library."""

import ctypes
import re
from pathlib import Path

import pytest

import calr_kernels
from calr_kernels.native import loader

HEADER = (Path(calr_kernels.__file__).parent / "csrc" / "calr.h").read_text()
C = re.sub(r"//[^\n]*", "", HEADER)
KINDS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def kind(declared):
    """The ctypes type of a parameter or field, declared as in `const void* x`."""
    if "*" in declared:
        return ctypes.c_void_p
    return KINDS.get(declared.split()[0])


def declared_functions():
    found = {}
    for returned, name, taken in re.findall(r"(\w+) (calr_\w+)\(([^)]*)\);", C):
        parameters = [] if taken.strip() in ("", "void") else taken.split(",")
        found[name] = KINDS.get(returned), [kind(p.strip()) for p in parameters]
    return found


def test_the_header_and_the_binding_declare_the_same_functions():
    assert declared_functions() == loader.FUNCTIONS


def test_the_header_and_the_binding_describe_a_layer_alike():
    body = re.search(r"struct calr_layer \{(.*?)\}", C, re.S).group(1)
    fields = [
        (re.search(r"(\w+)$", field.strip()).group(1), kind(field.strip()))
        for field in body.split(";")
        if field.strip()
    ]
    assert fields == list(loader.Layer._fields_)


@pytest.fixture
def forgotten(monkeypatch):
    """The library as if it had not been loaded yet, before and after."""
    loader.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    loader.library.cache_clear()


def test_an_unknown_instruction_set_is_refused(forgotten):
    forgotten.setenv("CALR_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="CALR_CPU_ISA='sse9'"):
        loader.library()


def test_a_damaged_native_kernel_is_as_none(forgotten, tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})
    forgotten.setattr(loader.importlib.util, "find_spec", lambda name: spec)
    with pytest.warns(UserWarning, match=r"no native CPU kernel .*_cpu\.so"):
        assert loader.library() is None

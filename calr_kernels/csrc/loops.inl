// Every loop that is compiled once for each instruction set (CALR_NAMESPACE, CALR_LANES: the float32
// values in one of its vectors). Later files use earlier ones.

namespace CALR_NAMESPACE {
#include "vector.inl"
#include "dots.inl"
#include "norm.inl"
#include "exponential.inl"
#include "activation.inl"
#include "attention.inl"
#include "quantized.inl"
#include "bytes.inl"
#include "numbers.inl"
#include "panels.inl"
#include "rounding.inl"
}  // namespace CALR_NAMESPACE

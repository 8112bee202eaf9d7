// What the kernels are written in: vectors of numbers, by Google Highway.
//
// A source that includes <hwy/foreach_target.h> includes itself again for each kind of processor (on x86-64 SSE2, SSE4,
// AVX2 and AVX-512, on Arm NEON), whose vectors, and all that is made of them, are in a namespace of its own. Which of
// them runs is selected at the first call. Nothing is fused but by multiply_add, so sums are the same wherever code is
// inlined.
#if defined(NMSPARSE_VECTORS_INL) == defined(HWY_TARGET_TOGGLE)  // once for each
#ifdef NMSPARSE_VECTORS_INL
#undef NMSPARSE_VECTORS_INL
#else
#define NMSPARSE_VECTORS_INL
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace nmsparse::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Vectors as long as a register.
constexpr hn::ScalableTag<float> FLOATS{};
constexpr hn::ScalableTag<int32_t> INTS{};
using Floats = hn::Vec<decltype(FLOATS)>;
using Ints = hn::Vec<decltype(INTS)>;
constexpr int LANES = hn::MaxLanes(FLOATS);

HWY_INLINE Floats load(float const* place) { return hn::LoadU(FLOATS, place); }
HWY_INLINE void store(float* place, Floats numbers) { hn::StoreU(numbers, FLOATS, place); }
HWY_INLINE Floats multiply_add(Floats numbers, float by, Floats sum) {
    return hn::MulAdd(numbers, hn::Set(FLOATS, by), sum);
}

// Number i of vector k is that of place COUNT * i + k; afterwards the places follow each other.
template <int COUNT, class Vector>
HWY_INLINE void put_in_order(Vector* vectors) {
    if constexpr (COUNT > 1) {
        constexpr hn::DFromV<Vector> d;
        Vector first[COUNT / 2], last[COUNT / 2];
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) {
            first[k] = hn::InterleaveWholeLower(d, vectors[k], vectors[k + COUNT / 2]);
            last[k] = hn::InterleaveWholeUpper(d, vectors[k], vectors[k + COUNT / 2]);
        }
        put_in_order<COUNT / 2>(first);
        put_in_order<COUNT / 2>(last);
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) vectors[k] = first[k], vectors[k + COUNT / 2] = last[k];
    }
}

// The way back.
template <int COUNT, class Vector>
HWY_INLINE void put_apart(Vector* vectors) {
    if constexpr (COUNT > 1) {
        constexpr hn::DFromV<Vector> d;
        Vector even[COUNT / 2], odd[COUNT / 2];
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) {
            even[k] = hn::ConcatEven(d, vectors[2 * k + 1], vectors[2 * k]);
            odd[k] = hn::ConcatOdd(d, vectors[2 * k + 1], vectors[2 * k]);
        }
        put_apart<COUNT / 2>(even);
        put_apart<COUNT / 2>(odd);
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) vectors[2 * k] = even[k], vectors[2 * k + 1] = odd[k];
    }
}

}  // namespace nmsparse::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif

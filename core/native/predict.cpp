// The query that a layer makes of its input, in one call and in the thread that asks: of small layers, where beginning
// each operation and waking other threads takes longer than the sums do.
#include <nanobind/stl/optional.h>

#include <cmath>
#include <optional>
#include <vector>

#include "bindings.h"
#include "lanes.h"
#include "native.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

constexpr size_t kRows = 4;  // of the weight, in one pass over the input

// Factors [n] of a normalisation by the root of the mean square, and what is added to the mean.
struct Norm {
    const float *weight;
    float epsilon;
};

struct QueryRequest {
    Variant variant;
    const float *input;  // [batch][tokens][width]
    Norm norm;           // [width]
    const float *weight, *bias;  // [heads * dim][width], [heads * dim] or null
    Norm head_norm;              // [dim], or null
    const float *cosines, *sines;  // [rotations][tokens][dim]
    size_t batch, tokens, width, heads, dim, rotations;  // as many rotations as sequences, or one for all
    float *out;  // [batch][heads][tokens][dim]
};

template <class Lanes>
HILLINFER_INLINE float sum_of(const Lanes &lanes) {
    float sum = 0.0f;
    for (size_t lane = 0; lane < sizeof lanes / sizeof(float); ++lane) sum += lanes[lane];
    return sum;
}

// `in` [count] normalised, to out [count], which may be the same.
template <class V>
HILLINFER_INLINE void normalise(const float *in, size_t count, const Norm &norm, float *out) {
    using Lanes = typename V::Lanes;
    const size_t whole = count / V::kLanes * V::kLanes;
    Lanes squares = {};
    for (size_t i = 0; i < whole; i += V::kLanes) squares += load<Lanes>(in + i) * load<Lanes>(in + i);
    float sum = sum_of(squares);
    for (size_t i = whole; i < count; ++i) sum += in[i] * in[i];
    const float scale = 1.0f / std::sqrt(sum / float(count) + norm.epsilon);
    for (size_t i = 0; i < count; ++i) out[i] = norm.weight[i] * (in[i] * scale);
}

// Products of `in` [width] with rows of the weight [rows][width], a multiple of kRows, to out [rows].
template <class V>
HILLINFER_INLINE void project(const float *in, const float *weight, const float *bias, size_t rows, size_t width,
                              float *out) {
    using Lanes = typename V::Lanes;
    const size_t whole = width / V::kLanes * V::kLanes;
    for (size_t row = 0; row < rows; row += kRows, weight += kRows * width) {
        Lanes sums[kRows] = {};
        for (size_t i = 0; i < whole; i += V::kLanes) {
            const Lanes part = load<Lanes>(in + i);
            for (size_t r = 0; r < kRows; ++r) sums[r] += part * load<Lanes>(weight + r * width + i);
        }
        const Lanes sum = totals(sums);
        for (size_t r = 0; r < kRows; ++r) {
            float product = sum[V::kLanes / kRows * r];
            for (size_t i = whole; i < width; ++i) product += in[i] * weight[r * width + i];
            out[row + r] = product + (bias ? bias[row + r] : 0.0f);
        }
    }
}

// `in` [dim], its halves turned against each other, to `out`.
HILLINFER_INLINE void rotate(const float *in, const float *cosines, const float *sines, size_t dim, float *out) {
    const size_t half = dim / 2;
    for (size_t i = 0; i < half; ++i) out[i] = in[i] * cosines[i] - in[i + half] * sines[i];
    for (size_t i = half; i < dim; ++i) out[i] = in[i] * cosines[i] + in[i - half] * sines[i];
}

template <class V>
HILLINFER_INLINE void make(const QueryRequest &request) {
    thread_local std::vector<float> normed, projected;
    const size_t width = request.width, dim = request.dim, tokens = request.tokens;
    normed.resize(width);
    projected.resize(request.heads * dim);
    for (size_t b = 0; b < request.batch; ++b)
        for (size_t t = 0; t < tokens; ++t) {
            normalise<V>(request.input + (b * tokens + t) * width, width, request.norm, normed.data());
            project<V>(normed.data(), request.weight, request.bias, projected.size(), width, projected.data());
            const size_t turned = ((request.rotations == 1 ? 0 : b) * tokens + t) * dim;
            for (size_t h = 0; h < request.heads; ++h) {
                float *const head = projected.data() + h * dim;
                if (request.head_norm.weight) normalise<V>(head, dim, request.head_norm, head);
                rotate(head, request.cosines + turned, request.sines + turned, dim,
                       request.out + ((b * request.heads + h) * tokens + t) * dim);
            }
        }
}

void make_portable(const QueryRequest &request) { make<Width<Lanes4, Whole4, 1>>(request); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void make_avx2(const QueryRequest &request) {
    make<Width<Lanes8, Whole8, 1>>(request);
}
__attribute__((target("avx512f"))) void make_avx512(const QueryRequest &request) {
    make<Width<Lanes16, Whole16, 1>>(request);
}
#endif

void make_query(const QueryRequest &request) {
#if defined(__x86_64__)
    if (request.variant == Variant::avx512vnni) return make_avx512(request);
    if (request.variant == Variant::avx2 && __builtin_cpu_supports("fma")) return make_avx2(request);
#endif
    make_portable(request);
}

using Floats1 = Array<const float, 1>;
using Floats3 = Array<const float, 3>;

// Whether shapes fit.
bool py_make_query(int variant, Floats3 input, Floats1 norm, float epsilon, Array<const float, 2> weight,
                   std::optional<Floats1> bias, std::optional<Floats1> head_norm, float head_epsilon, Floats3 cosines,
                   Floats3 sines, Array<float, 4> out) {
    const size_t batch = input.shape(0), tokens = input.shape(1), width = input.shape(2);
    const size_t heads = out.shape(1), dim = out.shape(3), rotations = cosines.shape(0);
    for (size_t axis = 0; axis < 3; ++axis)
        if (cosines.shape(axis) != sines.shape(axis)) return false;
    if (out.shape(0) != batch || out.shape(2) != tokens || !width || !dim || dim % kRows) return false;
    if (norm.shape(0) != width || weight.shape(0) != heads * dim || weight.shape(1) != width) return false;
    if ((bias && bias->shape(0) != heads * dim) || (head_norm && head_norm->shape(0) != dim)) return false;
    if ((rotations != 1 && rotations != batch) || cosines.shape(1) != tokens || cosines.shape(2) != dim) return false;
    make_query({Variant(variant), input.data(), {norm.data(), epsilon}, weight.data(), bias ? bias->data() : nullptr,
                {head_norm ? head_norm->data() : nullptr, head_epsilon}, cosines.data(), sines.data(), batch, tokens,
                width, heads, dim, rotations, out.data()});
    return true;
}

// Whether each of vectors [n][dim] is no further from its other than `most` of that one's length, and both are finite.
bool py_is_near(Array<const float, 2> vectors, Array<const float, 2> others, double most) {
    if (vectors.shape(0) != others.shape(0) || vectors.shape(1) != others.shape(1)) return false;
    const float *vector = vectors.data(), *other = others.data();
    for (size_t n = 0; n < vectors.shape(0); ++n) {
        double apart = 0.0, length = 0.0;
        for (size_t d = 0; d < vectors.shape(1); ++d, ++vector, ++other) {
            apart += (double(*vector) - double(*other)) * (double(*vector) - double(*other));
            length += double(*other) * double(*other);
        }
        if (!std::isfinite(length) || !(apart <= most * most * length)) return false;
    }
    return true;
}

}  // namespace

void define_predict(nb::module_ &module) {
    module.def("make_query", &py_make_query, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("is_near", &py_is_near, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
}

}  // namespace hillinfer

// Attention of one query token on a few hundred keys, in the thread that asks: others take longer to wake than this
// takes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "elements.h"
#include "lanes.h"
#include "native.h"

namespace hillinfer {
namespace {

constexpr size_t kQueries = 4;  // query heads in one pass over keys and values; more are done in further passes
constexpr size_t kTokens = 64;  // that are widened at a time

// exp(x) for x <= 0, within two units of the last place; nearly 0 far below. As expf of the Cephes library (Moshier).
template <class V>
HILLINFER_INLINE typename V::Lanes exp_of(typename V::Lanes x) {
    using Lanes = typename V::Lanes;
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    const Lanes n = (x * 1.44269504f + kRound) - kRound;
    const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_of<Lanes>((__builtin_convertvector(n, typename V::Whole) + 127) << 23);
}

// Rows [tokens][dim] as floats [tokens][padded]: where they are, or widened into `room`, whose padding is zero.
template <class Element>
HILLINFER_INLINE const float *as_floats(const void *rows, size_t first, size_t tokens, size_t dim, size_t padded,
                                        float *room) {
    const auto *from = static_cast<const typename Element::Storage *>(rows) + first * dim;
    if (Element::kIsFloat && dim == padded) return reinterpret_cast<const float *>(from);
    for (size_t t = 0; t < tokens; ++t)
        for (size_t d = 0; d < dim; ++d) room[t * padded + d] = Element::widen(from[t * dim + d]);
    return room;
}

// Scores of `count` keys [count][padded] for four queries [4][padded], to out [4][stride].
template <class V>
HILLINFER_INLINE void score(const float *q, const float *keys, size_t count, size_t padded, float *out,
                            size_t stride) {
    for (size_t t = 0; t < count; ++t, keys += padded) {
        using Lanes = typename V::Lanes;
        Lanes sums[kQueries] = {};
        for (size_t d = 0; d < padded; d += V::kLanes) {
            const Lanes key = load<Lanes>(keys + d);
            for (size_t r = 0; r < kQueries; ++r) sums[r] += key * load<Lanes>(q + r * padded + d);
        }
        const Lanes sum = totals(sums);
        for (size_t r = 0; r < kQueries; ++r) out[r * stride + t] = sum[V::kLanes / 4 * r];
    }
}

// Adds `count` values [count][padded], weighted by weights [4][stride], to out [4][padded]: kColumns vectors of it.
template <class V, size_t kColumns>
HILLINFER_INLINE void add(const float *weights, size_t stride, const float *values, size_t count, size_t padded,
                          float *out) {
    using Lanes = typename V::Lanes;
    Lanes sums[kQueries][kColumns];
    for (size_t r = 0; r < kQueries; ++r)
        for (size_t c = 0; c < kColumns; ++c) sums[r][c] = load<Lanes>(out + r * padded + c * V::kLanes);
    for (size_t t = 0; t < count; ++t, values += padded)
        for (size_t c = 0; c < kColumns; ++c) {
            const Lanes value = load<Lanes>(values + c * V::kLanes);
            for (size_t r = 0; r < kQueries; ++r) sums[r][c] += value * weights[r * stride + t];
        }
    for (size_t r = 0; r < kQueries; ++r)
        for (size_t c = 0; c < kColumns; ++c) store(out + r * padded + c * V::kLanes, sums[r][c]);
}

// Scores [stride] of `tokens` tokens become exp(score - the greatest); returns their sum. What is behind is overwritten.
template <class V>
HILLINFER_INLINE float weigh(float *scores, size_t tokens, size_t stride) {
    const float most = *std::max_element(scores, scores + tokens);
    std::fill(scores + tokens, scores + stride, -INFINITY);  // too little to count
    typename V::Lanes sum = {};
    for (size_t t = 0; t < stride; t += V::kLanes) {
        const typename V::Lanes weights = exp_of<V>(load<typename V::Lanes>(scores + t) - most);
        sum += weights;
        store(scores + t, weights);
    }
    float total = 0.0f;
    for (size_t lane = 0; lane < V::kLanes; ++lane) total += sum[lane];
    return total;
}

struct Memory {
    std::vector<float> q, rows, scores, out;
};

// Of one KV head: queries [group][dim] on keys and values [tokens][dim], to out [group][dim].
template <class V, class Element>
HILLINFER_INLINE void attend_head(const float *query, const void *keys, const void *values, size_t group,
                                  size_t tokens, size_t dim, float scaling, float *out, Memory &memory) {
    const auto whole = [](size_t count) { return (count + V::kLanes - 1) / V::kLanes * V::kLanes; };
    const size_t padded = whole(dim), stride = whole(tokens);
    memory.rows.assign(kTokens * padded, 0.0f);
    memory.scores.resize(kQueries * stride);
    float *const rows = memory.rows.data(), *const scores = memory.scores.data();
    for (size_t done = 0; done < group; done += kQueries) {
        const size_t now = std::min(group - done, kQueries);
        memory.q.assign(kQueries * padded, 0.0f);
        memory.out.assign(kQueries * padded, 0.0f);
        for (size_t r = 0; r < now; ++r)
            for (size_t d = 0; d < dim; ++d) memory.q[r * padded + d] = query[(done + r) * dim + d] * scaling;
        for (size_t t = 0; t < tokens; t += kTokens) {
            const size_t count = std::min(kTokens, tokens - t);
            const float *const part = as_floats<Element>(keys, t, count, dim, padded, rows);
            score<V>(memory.q.data(), part, count, padded, scores + t, stride);
        }
        float sums[kQueries];
        for (size_t r = 0; r < kQueries; ++r) sums[r] = weigh<V>(scores + r * stride, tokens, stride);
        for (size_t t = 0; t < tokens; t += kTokens) {
            const size_t count = std::min(kTokens, tokens - t);
            const float *const part = as_floats<Element>(values, t, count, dim, padded, rows);
            size_t d = 0;
            for (; d + V::kColumns * V::kLanes <= padded; d += V::kColumns * V::kLanes)
                add<V, V::kColumns>(scores + t, stride, part + d, count, padded, memory.out.data() + d);
            for (; d < padded; d += V::kLanes)
                add<V, 1>(scores + t, stride, part + d, count, padded, memory.out.data() + d);
        }
        for (size_t r = 0; r < now; ++r)
            for (size_t d = 0; d < dim; ++d) out[(done + r) * dim + d] = memory.out[r * padded + d] / sums[r];
    }
}

template <class V, class Element>
HILLINFER_INLINE void attend_heads(const AttendRequest &request) {
    thread_local Memory memory;
    const size_t rows = request.tokens * request.dim, queries = request.group * request.dim;
    const auto *keys = static_cast<const typename Element::Storage *>(request.keys);
    const auto *values = static_cast<const typename Element::Storage *>(request.values);
    for (size_t head = 0; head < request.heads; ++head)
        attend_head<V, Element>(request.query + head * queries, keys + head * rows, values + head * rows, request.group,
                             request.tokens, request.dim, request.scaling, request.out + head * queries, memory);
}

template <class V>
HILLINFER_INLINE void attend_format(const AttendRequest &request) {
    switch (request.format) {
        case Format::float16: return attend_heads<V, Half>(request);
        case Format::bfloat16: return attend_heads<V, BFloat>(request);
        default: return attend_heads<V, Single>(request);
    }
}

void attend_portable(const AttendRequest &request) { attend_format<Width<Lanes4, Whole4, 2>>(request); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void attend_avx2(const AttendRequest &request) {
    attend_format<Width<Lanes8, Whole8, 2>>(request);
}
__attribute__((target("avx512f"))) void attend_avx512(const AttendRequest &request) {
    attend_format<Width<Lanes16, Whole16, 4>>(request);
}
#endif

}  // namespace

void attend(const AttendRequest &request) {
#if defined(__x86_64__)
    if (request.variant == Variant::avx512vnni) return attend_avx512(request);
    if (request.variant == Variant::avx2 && __builtin_cpu_supports("fma")) return attend_avx2(request);
#endif
    attend_portable(request);
}

}  // namespace hillinfer

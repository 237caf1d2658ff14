#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "native.h"

namespace hillinfer {
namespace {

constexpr float kMost = 127.0f;

// How far the products of a query head with the zeros are behind those of the best, in units of sigma.
void offsets_of(const float *query, const float *zero, size_t group, size_t dim, float sigma, int32_t *offsets) {
    std::vector<double> shared(group);
    double greatest = -std::numeric_limits<double>::infinity();
    for (size_t member = 0; member < group; ++member) {
        double sum = 0.0;
        for (size_t d = 0; d < dim; ++d) sum += double(query[member * dim + d]) * double(zero[d]);
        shared[member] = sum;
        greatest = std::max(greatest, sum);
    }
    for (size_t member = 0; member < group; ++member) {
        const double behind = std::nearbyint((shared[member] - greatest) / double(sigma));
        offsets[member] = int32_t(std::clamp(behind, double(kLeastOffset), 0.0));
    }
}

}  // namespace

bool quantise_query(const float *query, const float *scale, const float *zero, size_t heads, size_t group, size_t dim,
                    bool sum, int8_t *q, int32_t *offsets, float *sigma) {
    const size_t vectors = sum ? 1 : group;
    std::vector<float> scaled(vectors * dim);
    for (size_t head = 0; head < heads; ++head, query += group * dim, scale += dim, zero += dim) {
        for (size_t member = 0; member < group; ++member)
            for (size_t d = 0; d < dim; ++d) {
                const float product = query[member * dim + d] * scale[d];
                float &at = scaled[(sum ? 0 : member) * dim + d];
                at = sum && member ? at + product : product;
            }
        float largest = 0.0f;
        bool finite = true;
        for (size_t i = 0; i < vectors * dim; ++i) {
            const float magnitude = std::fabs(scaled[i]);
            finite &= magnitude <= std::numeric_limits<float>::max();
            largest = magnitude > largest ? magnitude : largest;
        }
        if (!finite) return false;
        const float exact = largest / kMost;
        sigma[head] = exact > 0.0f ? exact : 1.0f;
        for (size_t i = 0; i < vectors * dim; ++i) {
            // Within the bounds first, as rounding then needs no more than baseline x86-64 has.
            const float level = std::min(std::max(scaled[i] / sigma[head], -kMost), kMost);
            q[i] = int8_t(int32_t((level + kRound) - kRound));
        }
        if (vectors > 1)
            offsets_of(query, zero, group, dim, sigma[head], offsets);
        else
            offsets[0] = 0;
        q += vectors * dim;
        offsets += vectors;
    }
    return true;
}

}  // namespace hillinfer

#include "elements.h"
#include "native.h"

namespace hillinfer {
namespace {

template <class Element>
QuantiseCounts quantise(const typename Element::Storage *rows, size_t tokens, size_t dim, const float *zero,
                        const float *inverse_scale, int bits, uint8_t *tiles) {
    QuantiseCounts counts;
    const float levels = float((1 << bits) - 1);
    const float too_high = levels + 0.5f;  // rounds to the even number above `levels`
    const size_t beats = dim * bits / 32;
    uint8_t k[kMaxDim];

    for (size_t token = 0; token < tokens; ++token) {
        const auto *key = rows + token * 2 * dim;
        uint32_t nonfinite = 0;
        for (size_t d = 0; d < 2 * dim; ++d) nonfinite += Element::nonfinite(key[d]);
        uint32_t clipped = 0;
        for (size_t d = 0; d < dim; ++d) {
            const float x = (Element::widen(key[d]) - zero[d]) * inverse_scale[d];
            clipped += (x < -0.5f) | (x >= too_high);
            float bounded = x > 0.0f ? x : 0.0f;  // NaN becomes 0 too
            bounded = bounded < levels ? bounded : levels;
            k[d] = uint8_t(int32_t((bounded + kRound) - kRound));
        }
        counts.nonfinite += nonfinite;
        counts.clipped += clipped;

        uint8_t *lane = tiles + token / kTileTokens * beats * kBeatBytes + token % kTileTokens * 4;
        if (bits == 8) {
            for (size_t j = 0; j < beats; ++j) std::memcpy(lane + j * kBeatBytes, k + 4 * j, 4);
        } else {
            for (size_t j = 0; j < beats; ++j) {
                uint32_t low, high;
                std::memcpy(&low, k + 8 * j, 4);
                std::memcpy(&high, k + 8 * j + 4, 4);
                const uint32_t packed = low | (high << 4);
                std::memcpy(lane + j * kBeatBytes, &packed, 4);
            }
        }
    }
    return counts;
}

template <class Element>
void widen(const typename Element::Storage *rows, size_t tokens, size_t dim, float *out) {
    for (size_t token = 0; token < tokens; ++token)
        for (size_t d = 0; d < dim; ++d) out[token * dim + d] = Element::widen(rows[token * 2 * dim + d]);
}

}  // namespace

void widen_keys(const void *rows, Format format, size_t tokens, size_t dim, float *out) {
    switch (format) {
        case Format::float16: return widen<Half>(static_cast<const uint16_t *>(rows), tokens, dim, out);
        case Format::bfloat16: return widen<BFloat>(static_cast<const uint16_t *>(rows), tokens, dim, out);
        case Format::float32: return widen<Single>(static_cast<const uint32_t *>(rows), tokens, dim, out);
    }
}

QuantiseCounts quantise_keys(const void *rows, Format format, size_t tokens, size_t dim, const float *zero,
                             const float *inverse_scale, int bits, uint8_t *tiles) {
    const size_t tile_count = (tokens + kTileTokens - 1) / kTileTokens;
    if (tokens % kTileTokens) {
        const size_t tile_bytes = kTileTokens * dim * bits / 8;
        std::memset(tiles + (tile_count - 1) * tile_bytes, 0, tile_bytes);
    }
    const auto *words = static_cast<const uint16_t *>(rows);
    switch (format) {
        case Format::float16: return quantise<Half>(words, tokens, dim, zero, inverse_scale, bits, tiles);
        case Format::bfloat16: return quantise<BFloat>(words, tokens, dim, zero, inverse_scale, bits, tiles);
        case Format::float32: break;
    }
    return quantise<Single>(static_cast<const uint32_t *>(rows), tokens, dim, zero, inverse_scale, bits, tiles);
}

}  // namespace hillinfer

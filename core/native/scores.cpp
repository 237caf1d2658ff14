// The dot products. Every variant sums exact integers, so all give the same bits; see layout.py for the tiles.
#include <algorithm>
#include <cstring>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

constexpr size_t kMaxGroups = 64;  // 4-byte groups of the query: head dimension 256

// Query heads scored in one pass over the tiles; more are done in further passes.
constexpr size_t kMaxQueries = 4;

uint32_t load_group(const int8_t *q) {
    uint32_t group;
    std::memcpy(&group, q, sizeof group);
    return group;
}

void portable(const uint8_t *tile, const int8_t *q, size_t beats, int bits, int32_t *out) {
    int32_t sums[kTileTokens] = {};
    for (size_t j = 0; j < beats; ++j) {
        const uint8_t *beat = tile + j * kBeatBytes;
        for (size_t t = 0; t < kTileTokens; ++t) {
            for (size_t i = 0; i < 4; ++i) {
                const int32_t k = beat[4 * t + i];
                sums[t] += bits == 8 ? q[4 * j + i] * k : q[8 * j + i] * (k & 15) + q[8 * j + 4 + i] * (k >> 4);
            }
        }
    }
    std::copy(sums, sums + kTileTokens, out);
}

void scores_portable(const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t queries, size_t dim,
                     int bits, int32_t *out) {
    const size_t beats = dim * bits / 32;
    for (size_t tile = 0; tile < tile_count; ++tile, tiles += beats * kBeatBytes, out += kTileTokens) {
        portable(tiles, q, beats, bits, out);
        for (size_t r = 1; r < queries; ++r) {
            int32_t other[kTileTokens];
            portable(tiles, q + r * dim, beats, bits, other);
            for (size_t t = 0; t < kTileTokens; ++t) out[t] = std::max(out[t], other[t]);
        }
    }
}

#if defined(__x86_64__)

#define HILLINFER_AVX2 __attribute__((target("avx2")))
#define HILLINFER_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

// `merge`: an earlier pass left the best of other query heads in `out`.
template <size_t kQueries, int kBits>
HILLINFER_AVX2 void avx2_pass(const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t dim, bool merge,
                              int32_t *out) {
    const size_t beats = dim * kBits / 32;
    const __m256i low_byte = _mm256_set1_epi16(0x00ff);
    const __m256i low_nibble = _mm256_set1_epi8(0x0f);
    const __m256i ones = _mm256_set1_epi16(1);

    // INT8: vpmaddubsw would saturate (2 * 255 * 127 > 32767), so even and odd bytes are widened to 16 bits
    // and the query is split alike. INT4: 2 * 15 * 127 fits.
    uint32_t even[kQueries][kMaxGroups], odd[kQueries][kMaxGroups];
    if (kBits == 8) {
        for (size_t r = 0; r < kQueries; ++r) {
            for (size_t j = 0; j < beats; ++j) {
                const int8_t *group = q + r * dim + 4 * j;
                even[r][j] = uint16_t(int16_t(group[0])) | uint32_t(uint16_t(int16_t(group[2]))) << 16;
                odd[r][j] = uint16_t(int16_t(group[1])) | uint32_t(uint16_t(int16_t(group[3]))) << 16;
            }
        }
    }
    for (size_t half = 0; half < 2 * tile_count; ++half) {
        const uint8_t *lane = tiles + half / 2 * beats * kBeatBytes + half % 2 * 32;
        __m256i sums[kQueries];
        for (size_t r = 0; r < kQueries; ++r) sums[r] = _mm256_setzero_si256();
        for (size_t j = 0; j < beats; ++j) {
            const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lane + j * kBeatBytes));
            const __m256i first = kBits == 8 ? _mm256_and_si256(k, low_byte) : _mm256_and_si256(k, low_nibble);
            const __m256i second = kBits == 8 ? _mm256_srli_epi16(k, 8)
                                              : _mm256_and_si256(_mm256_srli_epi16(k, 4), low_nibble);
            for (size_t r = 0; r < kQueries; ++r) {
                __m256i sum;
                if (kBits == 8) {
                    sum = _mm256_add_epi32(_mm256_madd_epi16(first, _mm256_set1_epi32(int(even[r][j]))),
                                           _mm256_madd_epi16(second, _mm256_set1_epi32(int(odd[r][j]))));
                } else {
                    const int8_t *group = q + r * dim + 8 * j;
                    const __m256i a = _mm256_maddubs_epi16(first, _mm256_set1_epi32(int(load_group(group))));
                    const __m256i b = _mm256_maddubs_epi16(second, _mm256_set1_epi32(int(load_group(group + 4))));
                    sum = _mm256_madd_epi16(_mm256_add_epi16(a, b), ones);
                }
                sums[r] = _mm256_add_epi32(sums[r], sum);
            }
        }
        auto *target = reinterpret_cast<__m256i *>(out + half * 8);
        __m256i best = sums[0];
        for (size_t r = 1; r < kQueries; ++r) best = _mm256_max_epi32(best, sums[r]);
        if (merge) best = _mm256_max_epi32(best, _mm256_loadu_si256(target));
        _mm256_storeu_si256(target, best);
    }
}

template <size_t kTiles, size_t kQueries, int kBits>
HILLINFER_VNNI void vnni_tiles(const uint8_t *tiles, const int8_t *q, size_t dim, bool merge, int32_t *out) {
    const size_t beats = dim * kBits / 32;
    const __m512i low_nibble = _mm512_set1_epi8(0x0f);
    __m512i sums[kTiles][kQueries];
    for (size_t t = 0; t < kTiles; ++t)
        for (size_t r = 0; r < kQueries; ++r) sums[t][r] = _mm512_setzero_si512();
    for (size_t j = 0; j < beats; ++j) {
        __m512i k[kTiles];
        for (size_t t = 0; t < kTiles; ++t) k[t] = _mm512_loadu_si512(tiles + (t * beats + j) * kBeatBytes);
        for (size_t r = 0; r < kQueries; ++r) {
            const int8_t *group = q + r * dim + j * (32 / kBits);
            const __m512i first = _mm512_set1_epi32(int(load_group(group)));
            if (kBits == 8) {
                for (size_t t = 0; t < kTiles; ++t) sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], k[t], first);
            } else {
                const __m512i second = _mm512_set1_epi32(int(load_group(group + 4)));
                for (size_t t = 0; t < kTiles; ++t) {
                    const __m512i low = _mm512_and_si512(k[t], low_nibble);
                    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(k[t], 4), low_nibble);
                    sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], low, first);
                    sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], high, second);
                }
            }
        }
    }
    for (size_t t = 0; t < kTiles; ++t) {
        __m512i best = sums[t][0];
        for (size_t r = 1; r < kQueries; ++r) best = _mm512_max_epi32(best, sums[t][r]);
        int32_t *target = out + t * kTileTokens;
        if (merge) best = _mm512_max_epi32(best, _mm512_loadu_si512(target));
        _mm512_storeu_si512(target, best);
    }
}

template <size_t kQueries, int kBits>
HILLINFER_VNNI void vnni_pass(const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t dim, bool merge,
                              int32_t *out) {
    constexpr size_t kTiles = 4;  // four tiles hide the latency of vpdpbusd and share each broadcast
    const size_t tile_bytes = kTileTokens * dim * kBits / 8;
    size_t tile = 0;
    for (; tile + kTiles <= tile_count; tile += kTiles)
        vnni_tiles<kTiles, kQueries, kBits>(tiles + tile * tile_bytes, q, dim, merge, out + tile * kTileTokens);
    for (; tile < tile_count; ++tile)
        vnni_tiles<1, kQueries, kBits>(tiles + tile * tile_bytes, q, dim, merge, out + tile * kTileTokens);
}

template <size_t kQueries, int kBits>
void pass(Variant variant, const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t dim, bool merge,
          int32_t *out) {
    if (variant == Variant::avx512vnni) {
        vnni_pass<kQueries, kBits>(tiles, tile_count, q, dim, merge, out);
    } else {
        avx2_pass<kQueries, kBits>(tiles, tile_count, q, dim, merge, out);
    }
}

template <int kBits>
void passes(Variant variant, const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t queries,
            size_t dim, int32_t *out) {
    for (size_t done = 0; done < queries;) {
        const size_t now = std::min(queries - done, kMaxQueries);
        const int8_t *first = q + done * dim;
        switch (now) {
            case 1: pass<1, kBits>(variant, tiles, tile_count, first, dim, done > 0, out); break;
            case 2: pass<2, kBits>(variant, tiles, tile_count, first, dim, done > 0, out); break;
            case 3: pass<3, kBits>(variant, tiles, tile_count, first, dim, done > 0, out); break;
            default: pass<4, kBits>(variant, tiles, tile_count, first, dim, done > 0, out); break;
        }
        done += now;
    }
}

#endif

}  // namespace

bool supported(Variant variant) {
    switch (variant) {
        case Variant::portable: return true;
#if defined(__x86_64__)
        case Variant::avx2: return __builtin_cpu_supports("avx2");
        case Variant::avx512vnni:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vnni");
#endif
        default: return false;
    }
}

void scores(Variant variant, const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t queries,
            size_t dim, int bits, int32_t *out) {
#if defined(__x86_64__)
    if (variant != Variant::portable) {
        if (bits == 8) return passes<8>(variant, tiles, tile_count, q, queries, dim, out);
        return passes<4>(variant, tiles, tile_count, q, queries, dim, out);
    }
#endif
    (void)variant;
    scores_portable(tiles, tile_count, q, queries, dim, bits, out);
}

}  // namespace hillinfer

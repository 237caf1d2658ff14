// Compaction: the scores at or above a threshold, with their ids.
#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

// The ids of scores: they count up from `first`, or are given. Given ids and their scores may be filtered in
// place: nothing is written beyond what has been read.
struct Ids {
    uint32_t first;
    const uint32_t *given;

    uint32_t operator[](size_t i) const { return given ? given[i] : first + uint32_t(i); }
    Ids after(size_t i) const { return {first + uint32_t(i), given ? given + i : nullptr}; }
};

size_t portable(Ids from, const int32_t *scores, size_t n, int32_t threshold, uint32_t *ids,
                int32_t *chosen) {
    size_t count = 0;
    for (size_t i = 0; i < n; ++i) {
        // Written always and kept where it counts: a branch would be mispredicted.
        const int32_t score = scores[i];
        ids[count] = from[i];
        chosen[count] = score;
        count += score >= threshold;
    }
    return count;
}

#if defined(__x86_64__)

// For each mask of 8 lanes the lanes that are set, in order, and then any.
struct Compressions {
    uint64_t lanes[256];

    constexpr Compressions() : lanes() {
        for (unsigned mask = 0; mask < 256; ++mask)
            for (unsigned lane = 0, to = 0; lane < 8; ++lane)
                if (mask >> lane & 1) lanes[mask] |= uint64_t(lane) << (8 * to++);
    }
};
constexpr Compressions kCompressions;

__attribute__((target("avx2,popcnt"))) size_t avx2(Ids from, const int32_t *scores, size_t n, int32_t threshold,
                                            uint32_t *ids, int32_t *chosen) {
    const __m256i least = _mm256_set1_epi32(threshold);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    size_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        // Without a branch, which would be mispredicted: 8 are written, and those that count kept.
        const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(scores + i));
        const __m256i id = from.given ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from.given + i))
                                      : _mm256_add_epi32(lanes, _mm256_set1_epi32(int(from[i])));
        const __m256i below = _mm256_cmpgt_epi32(least, s);
        const unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(below))) ^ 0xff;
        const __m256i order = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i *>(&kCompressions.lanes[mask])));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(ids + count), _mm256_permutevar8x32_epi32(id, order));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(chosen + count), _mm256_permutevar8x32_epi32(s, order));
        count += size_t(__builtin_popcount(mask));
    }
    return count + portable(from.after(i), scores + i, n - i, threshold, ids + count, chosen + count);
}

__attribute__((target("avx512f"))) size_t avx512(Ids from, const int32_t *scores, size_t n, int32_t threshold,
                                                 uint32_t *ids, int32_t *chosen) {
    const __m512i least = _mm512_set1_epi32(threshold);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    size_t count = 0, i = 0;
    for (; i + 64 <= n; i += 64) {
        __mmask16 masks[4];
        for (size_t v = 0; v < 4; ++v)
            masks[v] = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(scores + i + 16 * v), least);
        // Few thresholds are so high that 16 scores can be passed over with a branch that is mostly foreseen.
        if (!(masks[0] | masks[1] | masks[2] | masks[3])) continue;
        for (size_t v = 0; v < 4; ++v) {
            // Compressed in a register and stored whole: compressing stores are slow on some processors.
            const size_t at = i + 16 * v;
            const __m512i id = from.given ? _mm512_loadu_si512(from.given + at)
                                          : _mm512_add_epi32(lanes, _mm512_set1_epi32(int(from[at])));
            const __m512i s = _mm512_loadu_si512(scores + at);
            _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(masks[v], id));
            _mm512_storeu_si512(chosen + count, _mm512_maskz_compress_epi32(masks[v], s));
            count += size_t(__builtin_popcount(masks[v]));
        }
    }
    return count + portable(from.after(i), scores + i, n - i, threshold, ids + count, chosen + count);
}

#endif

size_t run(Variant variant, Ids from, const int32_t *scores, size_t n, int32_t threshold, uint32_t *ids,
           int32_t *chosen) {
#if defined(__x86_64__)
    if (variant == Variant::avx512vnni) return avx512(from, scores, n, threshold, ids, chosen);
    if (variant == Variant::avx2) return avx2(from, scores, n, threshold, ids, chosen);
#else
    (void)variant;
#endif
    return portable(from, scores, n, threshold, ids, chosen);
}

}  // namespace

size_t filter(Variant variant, const int32_t *scores, size_t n, int32_t threshold, uint32_t first_id,
              uint32_t *ids, int32_t *chosen) {
    return run(variant, {first_id, nullptr}, scores, n, threshold, ids, chosen);
}

size_t filter(Variant variant, size_t n, int32_t threshold, uint32_t *ids, int32_t *scores) {
    return run(variant, {0, ids}, scores, n, threshold, ids, scores);
}

}  // namespace hillinfer

// The checksum of evaluation keys (docs/evaluation.md, "Data checksum"): two sums for each 32-bit word of a beat.
#include <cstring>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

constexpr size_t kWords = kTileTokens;

void portable(const uint8_t *beats, size_t count, DataSums &sums) {
    for (size_t beat = 0; beat < count; ++beat, beats += kBeatBytes) {
        uint32_t words[kWords];
        std::memcpy(words, beats, sizeof words);
        for (size_t t = 0; t < kWords; ++t) {
            sums.first[t] += words[t];
            sums.second[t] += sums.first[t];
        }
    }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) void avx2(const uint8_t *beats, size_t count, DataSums &sums) {
    __m256i first[4], second[4];
    for (size_t i = 0; i < 4; ++i) {
        first[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums.first + 4 * i));
        second[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums.second + 4 * i));
    }
    for (size_t beat = 0; beat < count; ++beat, beats += kBeatBytes) {
        for (size_t i = 0; i < 4; ++i) {
            const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(beats + 16 * i));
            first[i] = _mm256_add_epi64(first[i], _mm256_cvtepu32_epi64(words));
            second[i] = _mm256_add_epi64(second[i], first[i]);
        }
    }
    for (size_t i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums.first + 4 * i), first[i]);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums.second + 4 * i), second[i]);
    }
}

__attribute__((target("avx512f"))) void avx512(const uint8_t *beats, size_t count, DataSums &sums) {
    __m512i first[2], second[2];
    for (size_t i = 0; i < 2; ++i) {
        first[i] = _mm512_loadu_si512(sums.first + 8 * i);
        second[i] = _mm512_loadu_si512(sums.second + 8 * i);
    }
    for (size_t beat = 0; beat < count; ++beat, beats += kBeatBytes) {
        for (size_t i = 0; i < 2; ++i) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(beats + 32 * i));
            first[i] = _mm512_add_epi64(first[i], _mm512_cvtepu32_epi64(words));
            second[i] = _mm512_add_epi64(second[i], first[i]);
        }
    }
    for (size_t i = 0; i < 2; ++i) {
        _mm512_storeu_si512(sums.first + 8 * i, first[i]);
        _mm512_storeu_si512(sums.second + 8 * i, second[i]);
    }
}

#endif

}  // namespace

void add_beats(Variant variant, const uint8_t *beats, size_t count, DataSums &sums) {
#if defined(__x86_64__)
    if (variant == Variant::avx512vnni) return avx512(beats, count, sums);
    if (variant == Variant::avx2) return avx2(beats, count, sums);
#else
    (void)variant;
#endif
    portable(beats, count, sums);
}

void join(DataSums &sums, const DataSums &following, size_t following_beats) {
    for (size_t t = 0; t < kWords; ++t) {
        sums.second[t] += following_beats * sums.first[t] + following.second[t];
        sums.first[t] += following.first[t];
    }
}

uint32_t data_checksum(const DataSums &sums) {
    static_assert(sizeof(DataSums) == 256, "the CRC is of the 32 sums and nothing else");
    uint32_t crc;
    row_checksums(true, reinterpret_cast<const uint8_t *>(&sums), 1, sizeof sums, &crc);
    return crc;
}

}  // namespace hillinfer

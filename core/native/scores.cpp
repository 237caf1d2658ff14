// The dot products. Every variant sums exact integers, so all give the same bits; see layout.py for the tiles.
#include <algorithm>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

// Query heads scored in one pass over the tiles; more are done in further passes.
constexpr size_t kMaxQueries = 4;

template <class Query>
void portable(const uint8_t *tile, const Query *q, int32_t offset, size_t beats, int bits, int32_t *out) {
    int32_t sums[kTileTokens];
    std::fill(sums, sums + kTileTokens, offset);
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

template <class Query>
void scores_portable(const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
                     size_t queries, size_t dim, int bits, int32_t *out) {
    const size_t beats = dim * bits / 32;
    for (size_t tile = 0; tile < tile_count; ++tile, tiles += beats * kBeatBytes, out += kTileTokens) {
        portable(tiles, q, offsets[0], beats, bits, out);
        for (size_t r = 1; r < queries; ++r) {
            int32_t other[kTileTokens];
            portable(tiles, q + r * dim, offsets[r], beats, bits, other);
            for (size_t t = 0; t < kTileTokens; ++t) out[t] = std::max(out[t], other[t]);
        }
    }
}

#if defined(__x86_64__)

#define HILLINFER_AVX2 __attribute__((target("avx2")))
#define HILLINFER_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

// A beat meets the query as bytes where that cannot saturate, and else as 16-bit numbers.
//
// Bytes: vpdpbusd sums four products in 32 bits. vpmaddubsw sums two in 16 bits, which is enough for INT4
// (2 * 15 * 127) but not for INT8 (2 * 255 * 127 > 32767). INT16 queries are never bytes.
template <class Query, int kBits, bool kVnni>
constexpr bool kBytes = sizeof(Query) == 1 && (kVnni || kBits == 4);

// Vectors that a beat is taken apart to: bytes of the low and the high nibbles; 16-bit numbers also of the
// even and the odd bytes.
template <int kBits, bool kAsBytes>
constexpr size_t kOperands = (kAsBytes ? 1 : 2) * 8 / kBits;

// The query's side of one operand: what is broadcast to every token.
template <class Query, bool kAsBytes>
uint32_t broadcast_word(const Query *group, size_t operand) {
    uint32_t word = 0;
    if (kAsBytes) {
        for (size_t i = 0; i < 4; ++i) word |= uint32_t(uint8_t(group[4 * operand + i])) << (8 * i);
    } else {
        const Query *first = group + operand / 2 * 4 + operand % 2;
        word = uint16_t(int16_t(first[0])) | uint32_t(uint16_t(int16_t(first[2]))) << 16;
    }
    return word;
}

// [beats][operands][queries]: in the order of use.
template <class Query, int kBits, bool kAsBytes, size_t kQueries>
void broadcast_words(const Query *q, size_t dim, uint32_t *words) {
    for (size_t d = 0; d < dim; d += 32 / kBits)
        for (size_t o = 0; o < kOperands<kBits, kAsBytes>; ++o)
            for (size_t r = 0; r < kQueries; ++r)
                *words++ = broadcast_word<Query, kAsBytes>(q + r * dim + d, o);
}

template <int kBits, bool kAsBytes>
HILLINFER_AVX2 inline __m256i avx2_operand(__m256i k, size_t operand) {
    if (kAsBytes) {
        if (kBits == 8) return k;
        return _mm256_and_si256(operand ? _mm256_srli_epi16(k, 4) : k, _mm256_set1_epi8(0x0f));
    }
    if (kBits == 8) return operand ? _mm256_srli_epi16(k, 8) : _mm256_and_si256(k, _mm256_set1_epi16(0x00ff));
    // Operands: low nibbles of even and odd bytes, then the high ones.
    const int shift = int(operand % 2 * 8 + operand / 2 * 4);
    return _mm256_and_si256(_mm256_srli_epi16(k, shift), _mm256_set1_epi16(0x000f));
}

// How far ahead keys are fetched, in bytes. Two dozen instructions for each line leave too few lines in flight;
// with VNNI's half a dozen the processor does better by itself (docs/kernel.md).
constexpr size_t kAvx2Ahead = 2048;

// Half a beat: 8 tokens.
template <int kBits, bool kAsBytes, size_t kQueries>
HILLINFER_AVX2 inline void avx2_half(const uint8_t *half, const uint32_t *words, __m256i *sums) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(half));
    if (kAsBytes) {
        const __m256i low = avx2_operand<kBits, true>(k, 0), high = avx2_operand<kBits, true>(k, 1);
        for (size_t r = 0; r < kQueries; ++r) {
            const __m256i pairs =
                _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_set1_epi32(int(words[r]))),
                                 _mm256_maddubs_epi16(high, _mm256_set1_epi32(int(words[kQueries + r]))));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        return;
    }
    for (size_t o = 0; o < kOperands<kBits, kAsBytes>; ++o) {
        const __m256i operand = avx2_operand<kBits, false>(k, o);
        for (size_t r = 0; r < kQueries; ++r) {
            const __m256i word = _mm256_set1_epi32(int(*words++));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(operand, word));
        }
    }
}

// `merge`: an earlier pass left the best of other query heads in `out`.
template <class Query, size_t kQueries, int kBits>
HILLINFER_AVX2 void avx2_pass(const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
                              size_t dim, bool merge, int32_t *out) {
    constexpr bool kAsBytes = kBytes<Query, kBits, false>;
    constexpr size_t kWords = kOperands<kBits, kAsBytes> * kQueries;  // for each beat
    const size_t beats = dim * kBits / 32;
    uint32_t words[kQueries * kMaxDim / 2];
    broadcast_words<Query, kBits, kAsBytes, kQueries>(q, dim, words);
    for (size_t tile = 0; tile < tile_count; ++tile, tiles += beats * kBeatBytes, out += kTileTokens) {
        __m256i first[kQueries], second[kQueries];  // of tokens 0 to 7, and 8 to 15
        for (size_t r = 0; r < kQueries; ++r) first[r] = second[r] = _mm256_set1_epi32(offsets[r]);
        for (size_t j = 0; j < beats; ++j) {
            const uint8_t *beat = tiles + j * kBeatBytes;
            __builtin_prefetch(beat + kAvx2Ahead);
            avx2_half<kBits, kAsBytes, kQueries>(beat, words + j * kWords, first);
            avx2_half<kBits, kAsBytes, kQueries>(beat + 32, words + j * kWords, second);
        }
        for (size_t r = 1; r < kQueries; ++r) {
            first[0] = _mm256_max_epi32(first[0], first[r]);
            second[0] = _mm256_max_epi32(second[0], second[r]);
        }
        auto *target = reinterpret_cast<__m256i *>(out);
        if (merge) {
            first[0] = _mm256_max_epi32(first[0], _mm256_loadu_si256(target));
            second[0] = _mm256_max_epi32(second[0], _mm256_loadu_si256(target + 1));
        }
        _mm256_storeu_si256(target, first[0]);
        _mm256_storeu_si256(target + 1, second[0]);
    }
}

template <int kBits, bool kAsBytes>
HILLINFER_VNNI inline __m512i vnni_operand(__m512i k, size_t operand) {
    if (kAsBytes) {
        if (kBits == 8) return k;
        return _mm512_and_si512(operand ? _mm512_srli_epi16(k, 4) : k, _mm512_set1_epi8(0x0f));
    }
    if (kBits == 8) return operand ? _mm512_srli_epi16(k, 8) : _mm512_and_si512(k, _mm512_set1_epi16(0x00ff));
    const unsigned shift = unsigned(operand % 2 * 8 + operand / 2 * 4);
    return _mm512_and_si512(_mm512_srli_epi16(k, shift), _mm512_set1_epi16(0x000f));
}

template <int kBits, bool kAsBytes, size_t kQueries>
HILLINFER_VNNI inline void vnni_beat(const uint8_t *beat, const uint32_t *words, __m512i *sums) {
    const __m512i k = _mm512_loadu_si512(beat);
    for (size_t o = 0; o < kOperands<kBits, kAsBytes>; ++o) {
        const __m512i operand = vnni_operand<kBits, kAsBytes>(k, o);
        for (size_t r = 0; r < kQueries; ++r) {
            const __m512i word = _mm512_set1_epi32(int(*words++));
            sums[r] = kAsBytes ? _mm512_dpbusd_epi32(sums[r], operand, word)
                               : _mm512_dpwssd_epi32(sums[r], operand, word);
        }
    }
}

template <class Query, size_t kQueries, int kBits>
HILLINFER_VNNI void vnni_pass(const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
                              size_t dim, bool merge, int32_t *out) {
    constexpr bool kAsBytes = kBytes<Query, kBits, true>;
    constexpr size_t kWords = kOperands<kBits, kAsBytes> * kQueries;  // for each beat
    // Sums that do not wait for one another hide the latency of vpdpbusd. They are of beats of one tile, not
    // of several tiles: memory is then read from front to back, which is what processors foresee best.
    constexpr size_t kChains = 4 / kQueries > 0 ? 4 / kQueries : 1;
    const size_t beats = dim * kBits / 32;
    uint32_t words[kQueries * kMaxDim / 2];
    broadcast_words<Query, kBits, kAsBytes, kQueries>(q, dim, words);
    for (size_t tile = 0; tile < tile_count; ++tile, tiles += beats * kBeatBytes, out += kTileTokens) {
        __m512i sums[kChains][kQueries];
        for (size_t c = 0; c < kChains; ++c)
            for (size_t r = 0; r < kQueries; ++r) sums[c][r] = _mm512_set1_epi32(c == 0 ? offsets[r] : 0);
        size_t j = 0;
        for (; j + kChains <= beats; j += kChains)
            for (size_t c = 0; c < kChains; ++c)
                vnni_beat<kBits, kAsBytes, kQueries>(tiles + (j + c) * kBeatBytes, words + (j + c) * kWords, sums[c]);
        for (; j < beats; ++j)
            vnni_beat<kBits, kAsBytes, kQueries>(tiles + j * kBeatBytes, words + j * kWords, sums[0]);
        __m512i best;
        for (size_t r = 0; r < kQueries; ++r) {
            for (size_t c = 1; c < kChains; ++c) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[c][r]);
            best = r == 0 ? sums[0][0] : _mm512_max_epi32(best, sums[0][r]);
        }
        if (merge) best = _mm512_max_epi32(best, _mm512_loadu_si512(out));
        _mm512_storeu_si512(out, best);
    }
}

template <class Query, size_t kQueries, int kBits>
void pass(Variant variant, const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
          size_t dim, bool merge, int32_t *out) {
    if (variant == Variant::avx512vnni) {
        vnni_pass<Query, kQueries, kBits>(tiles, tile_count, q, offsets, dim, merge, out);
    } else {
        avx2_pass<Query, kQueries, kBits>(tiles, tile_count, q, offsets, dim, merge, out);
    }
}

template <class Query, int kBits>
void passes(Variant variant, const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
            size_t queries, size_t dim, int32_t *out) {
    for (size_t done = 0; done < queries;) {
        const size_t now = std::min(queries - done, kMaxQueries);
        const Query *first = q + done * dim;
        const int32_t *base = offsets + done;
        const bool merge = done > 0;
        switch (now) {
            case 1: pass<Query, 1, kBits>(variant, tiles, tile_count, first, base, dim, merge, out); break;
            case 2: pass<Query, 2, kBits>(variant, tiles, tile_count, first, base, dim, merge, out); break;
            case 3: pass<Query, 3, kBits>(variant, tiles, tile_count, first, base, dim, merge, out); break;
            default: pass<Query, 4, kBits>(variant, tiles, tile_count, first, base, dim, merge, out); break;
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

template <class Query>
void scores(Variant variant, const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
            size_t queries, size_t dim, int bits, int32_t *out) {
#if defined(__x86_64__)
    if (variant != Variant::portable) {
        if (bits == 8) return passes<Query, 8>(variant, tiles, tile_count, q, offsets, queries, dim, out);
        return passes<Query, 4>(variant, tiles, tile_count, q, offsets, queries, dim, out);
    }
#endif
    (void)variant;
    scores_portable(tiles, tile_count, q, offsets, queries, dim, bits, out);
}

template void scores<int8_t>(Variant, const uint8_t *, size_t, const int8_t *, const int32_t *, size_t, size_t, int,
                             int32_t *);
template void scores<int16_t>(Variant, const uint8_t *, size_t, const int16_t *, const int32_t *, size_t, size_t, int,
                              int32_t *);

}  // namespace hillinfer

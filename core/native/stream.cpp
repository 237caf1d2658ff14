// The fastest that memory can be read here: what the kernel's rate is compared with.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "compute_pool.h"
#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

constexpr size_t kStreamBytes = 1 << 20;

uint64_t portable(const uint8_t *data, size_t bytes) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < bytes; i += 64) {
        uint64_t words[8];
        std::memcpy(words, data + i, sizeof words);
        for (size_t w = 0; w < 8; ++w) sums[w] += words[w];
    }
    uint64_t total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) uint64_t avx2(const uint8_t *data, size_t bytes) {
    __m256i sums[8];
    for (auto &sum : sums) sum = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256)
        for (size_t w = 0; w < 8; ++w)
            sums[w] = _mm256_add_epi64(
                sums[w], _mm256_loadu_si256(reinterpret_cast<const __m256i *>(data + i + 32 * w)));
    uint64_t total = portable(data + i, bytes - i);
    for (const auto &sum : sums) {
        uint64_t words[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(words), sum);
        for (uint64_t word : words) total += word;
    }
    return total;
}

__attribute__((target("avx512f"))) uint64_t avx512(const uint8_t *data, size_t bytes) {
    __m512i sums[8];
    for (auto &sum : sums) sum = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 512 <= bytes; i += 512)
        for (size_t w = 0; w < 8; ++w)
            sums[w] = _mm512_add_epi64(sums[w], _mm512_loadu_si512(data + i + 64 * w));
    uint64_t total = portable(data + i, bytes - i);
    for (const auto &sum : sums) {
        uint64_t words[8];
        _mm512_storeu_si512(words, sum);
        for (uint64_t word : words) total += word;
    }
    return total;
}

#endif

uint64_t chunk(Variant variant, const uint8_t *data, size_t bytes) {
#if defined(__x86_64__)
    if (variant == Variant::avx512vnni) return avx512(data, bytes);
    if (variant == Variant::avx2) return avx2(data, bytes);
#else
    (void)variant;
#endif
    return portable(data, bytes);
}

}  // namespace

uint64_t stream_read(Variant variant, const uint8_t *data, size_t bytes, size_t threads) {
    std::atomic<uint64_t> total{0};
    ComputePool::instance().run((bytes + kStreamBytes - 1) / kStreamBytes, threads, [&](size_t i) {
        const size_t at = i * kStreamBytes;
        total += chunk(variant, data + at, std::min(kStreamBytes, bytes - at));
    });
    return total;
}

}  // namespace hillinfer

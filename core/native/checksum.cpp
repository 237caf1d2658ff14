#include <array>
#include <cstring>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hillinfer {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;  // CRC-32C (Castagnoli), bits reflected: RFC 3720, B.4

std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
        table[byte] = crc;
    }
    return table;
}

void portable(const uint8_t *rows, size_t n, size_t row_bytes, uint32_t *out) {
    static const std::array<uint32_t, 256> table = make_table();
    for (size_t row = 0; row < n; ++row, rows += row_bytes) {
        uint32_t crc = ~0u;
        for (size_t i = 0; i < row_bytes; ++i) crc = (crc >> 8) ^ table[(crc ^ rows[i]) & 0xff];
        out[row] = ~crc;
    }
}

#if defined(__x86_64__)
// crc32 has a latency of three cycles and a throughput of one, hence the rows in parallel.
template <size_t kRows>
__attribute__((target("sse4.2"))) void sse42_rows(const uint8_t *rows, size_t row_bytes, uint32_t *out) {
    uint64_t crc[kRows];
    for (size_t r = 0; r < kRows; ++r) crc[r] = ~0u;
    size_t i = 0;
    for (; i + 8 <= row_bytes; i += 8) {
        for (size_t r = 0; r < kRows; ++r) {
            uint64_t word;
            std::memcpy(&word, rows + r * row_bytes + i, 8);
            crc[r] = _mm_crc32_u64(crc[r], word);
        }
    }
    for (; i < row_bytes; ++i)
        for (size_t r = 0; r < kRows; ++r) crc[r] = _mm_crc32_u8(uint32_t(crc[r]), rows[r * row_bytes + i]);
    for (size_t r = 0; r < kRows; ++r) out[r] = ~uint32_t(crc[r]);
}

void sse42(const uint8_t *rows, size_t n, size_t row_bytes, uint32_t *out) {
    size_t row = 0;
    for (; row + 4 <= n; row += 4) sse42_rows<4>(rows + row * row_bytes, row_bytes, out + row);
    for (; row < n; ++row) sse42_rows<1>(rows + row * row_bytes, row_bytes, out + row);
}
#endif

}  // namespace

void row_checksums(bool hardware, const uint8_t *rows, size_t n, size_t row_bytes, uint32_t *out) {
#if defined(__x86_64__)
    if (hardware && __builtin_cpu_supports("sse4.2")) return sse42(rows, n, row_bytes, out);
#else
    (void)hardware;
#endif
    portable(rows, n, row_bytes, out);
}

}  // namespace hillinfer

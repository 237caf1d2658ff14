// Numbers of keys and values as they are stored, and what they are as floats.
#pragma once

#include <cstdint>
#include <cstring>

namespace hillinfer {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Half {
    using Storage = uint16_t;
    static constexpr bool kIsFloat = false;
    static float widen(Storage bits) {
        const uint32_t magnitude = bits & 0x7fffu;
        // 2^112 moves the exponent from bias 15 to bias 127, and makes subnormal halves normal.
        const float scaled = from_bits(magnitude << 13) * 0x1p112f;
        uint32_t wide;
        std::memcpy(&wide, &scaled, sizeof wide);
        wide |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
        return from_bits(wide | (uint32_t(bits & 0x8000u) << 16));
    }
    static bool nonfinite(Storage bits) { return (bits & 0x7c00u) == 0x7c00u; }
};

struct BFloat {
    using Storage = uint16_t;
    static constexpr bool kIsFloat = false;
    static float widen(Storage bits) { return from_bits(uint32_t(bits) << 16); }
    static bool nonfinite(Storage bits) { return (bits & 0x7f80u) == 0x7f80u; }
};

struct Single {
    using Storage = uint32_t;
    static constexpr bool kIsFloat = true;
    static float widen(Storage bits) { return from_bits(bits); }
    static bool nonfinite(Storage bits) { return (bits & 0x7f800000u) == 0x7f800000u; }
};

}  // namespace hillinfer

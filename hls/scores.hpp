// The tasks that make a head's scores: keys read and checked, the query, the products. Of evaluate.cpp alone.
#pragma once

#include "evaluate.hpp"

#include <hls_stream.h>

namespace hillinfer {
namespace {

typedef ap_int<32> Score;

// What the tasks of a head have to know of it.
struct Job {
    uint32_t key_stride, tiles, begin, end, dim, vectors, k, first_id;

    uint32_t chosen() const { return k < end - begin ? k : end - begin; }
};

// Where the bins of a histogram lie: bin = (score - low) >> shift.
struct Range {
    Score low;
    ap_uint<5> shift;
};

// BITS of a key element and of a query element. A beat has STEP dimensions of each of 16 tokens.
template <int KEY_BITS, int QUERY_BITS>
struct Format {
    static const int STEP = 32 / KEY_BITS;
    static const int LEVELS = (1 << KEY_BITS) - 1;
    static const int MAX_BEATS = MAX_DIM / STEP;
    static const int SLICES = 512 / (QUERY_BITS * STEP);  // slices of STEP query elements in a word
    typedef ap_uint<QUERY_BITS * STEP> Slice;
};

Score score_of(const Word &word, int lane) {
#pragma HLS INLINE
    return Score(word.range(32 * lane + 31, 32 * lane));
}

// The lanes of a tile that are tokens to be scanned.
ap_uint<16> lanes_of(const Job &job, uint32_t tile) {
#pragma HLS INLINE
    ap_uint<16> lanes = 0;
    for (int lane = 0; lane < TILE_TOKENS; ++lane) {
#pragma HLS UNROLL
        const uint32_t token = tile * TILE_TOKENS + lane;
        lanes[lane] = token >= job.begin && token < job.end;
    }
    return lanes;
}

void read_keys(const Word *keys, const Job job, uint32_t head, uint32_t beats, hls::stream<Word> &out) {
    const uint64_t start = uint64_t(head) * job.key_stride;
read_keys:
    for (uint32_t i = 0; i < job.tiles * beats; ++i) {
#pragma HLS PIPELINE II = 1
        out.write(keys[start + i]);
    }
}

// The CRC-32C of the sums, 32 bits a cycle: unrolled, each step is one layer of exclusive-or.
uint32_t crc_of(const ap_uint<64> sums[2 * TILE_TOKENS]) {
    ap_uint<32> crc = 0xffffffff;
crc:
    for (int i = 0; i < 4 * TILE_TOKENS; ++i) {
#pragma HLS PIPELINE II = 1
        const ap_uint<64> sum = sums[i / 2];
        crc ^= i % 2 ? ap_uint<32>(sum >> 32) : ap_uint<32>(sum);
        for (int bit = 0; bit < 32; ++bit) {
#pragma HLS UNROLL
            const bool low = crc[0];
            crc >>= 1;
            if (low) crc ^= 0x82f63b78;
        }
    }
    return ~crc;
}

void check_keys(const Job job, uint32_t beats, hls::stream<Word> &in, hls::stream<Word> &out,
                hls::stream<uint32_t> &checksum) {
    ap_uint<64> sums[2 * TILE_TOKENS];
#pragma HLS ARRAY_PARTITION variable = sums complete
    for (int i = 0; i < 2 * TILE_TOKENS; ++i) {
#pragma HLS UNROLL
        sums[i] = 0;
    }
check_keys:
    for (uint32_t i = 0; i < job.tiles * beats; ++i) {
#pragma HLS PIPELINE II = 1
        const Word beat = in.read();
        for (int lane = 0; lane < TILE_TOKENS; ++lane) {
#pragma HLS UNROLL
            sums[lane] += ap_uint<32>(beat.range(32 * lane + 31, 32 * lane));
            sums[TILE_TOKENS + lane] += sums[lane];
        }
        out.write(beat);
    }
    checksum.write(crc_of(sums));
}

// Puts the query into block RAM, a slice for each beat, its offsets into registers, and derives the range of scores.
template <typename F, int QUERY_BITS>
void read_query(const Word *queries, const Job job, uint32_t head,
                typename F::Slice query[MAX_VECTORS * F::MAX_BEATS], Score offsets[MAX_VECTORS],
                hls::stream<Range> &range_of_tally, hls::stream<Range> &range_of_choose, hls::stream<Range> &range_of_summary) {
    const uint32_t beats = job.dim / F::STEP;
    Score low = 0, high = 0;
    uint64_t next = uint64_t(head) * (1 + job.vectors * ((beats + F::SLICES - 1) / F::SLICES));
    const Word first = queries[next++];
    for (uint32_t vector = 0; vector < job.vectors; ++vector) {
        Word word = 0;
        Score least = 0, greatest = 0;
    read_query:
        for (uint32_t beat = 0; beat < beats; ++beat) {
#pragma HLS PIPELINE II = 1
            if (beat % F::SLICES == 0) word = queries[next++];
            const typename F::Slice slice = word;
            word >>= QUERY_BITS * F::STEP;
            query[vector * F::MAX_BEATS + beat] = slice;
            for (int i = 0; i < F::STEP; ++i) {
#pragma HLS UNROLL
                const ap_int<QUERY_BITS> element =
                    ap_int<QUERY_BITS>(slice.range(QUERY_BITS * i + QUERY_BITS - 1, QUERY_BITS * i));
                (element < 0 ? least : greatest) += element;
            }
        }
        const Score offset = score_of(first, vector);
        offsets[vector] = offset;
        least = F::LEVELS * least + offset;
        greatest = F::LEVELS * greatest + offset;
        if (vector == 0 || least > low) low = least;
        if (vector == 0 || greatest > high) high = greatest;
    }
    const ap_uint<32> span = high - low;
    Range range = {low, 0};
    for (int shift = 1; shift <= 32 - BIN_BITS; ++shift) {
#pragma HLS UNROLL
        if ((span >> (BIN_BITS - 1 + shift)) != 0) range.shift = shift;
    }
    range_of_tally.write(range);
    range_of_choose.write(range);
    range_of_summary.write(range);
}

// 16 lanes of STEP multipliers: a beat meets each query vector in turn, one a cycle.
template <typename F, int KEY_BITS, int QUERY_BITS>
void score_tiles(const Job job, const typename F::Slice query[MAX_VECTORS * F::MAX_BEATS],
                 const Score offsets[MAX_VECTORS], hls::stream<Word> &keys, hls::stream<Word> &scores) {
    const uint32_t beats = job.dim / F::STEP;
    Score sums[MAX_VECTORS][TILE_TOKENS];
#pragma HLS ARRAY_PARTITION variable = sums complete
    Word beat_word = 0;
    uint32_t beat = 0, vector = 0;
    const uint32_t steps = job.tiles * beats * job.vectors;
score_tiles:
    for (uint32_t step = 0; step < steps; ++step) {
#pragma HLS PIPELINE II = 1
        if (vector == 0) beat_word = keys.read();
        const typename F::Slice slice = query[vector * F::MAX_BEATS + beat];
        Word result;
        for (int lane = 0; lane < TILE_TOKENS; ++lane) {
#pragma HLS UNROLL
            const ap_uint<32> key_word = beat_word.range(32 * lane + 31, 32 * lane);
            Score dot = 0;
            for (int i = 0; i < F::STEP; ++i) {
#pragma HLS UNROLL
                // INT4: dims 0-3 of the beat are low nibbles of the four bytes, dims 4-7 high ones.
                const int at = KEY_BITS == 8 ? 8 * i : 8 * (i % 4) + 4 * (i / 4);
                const ap_uint<KEY_BITS> key = key_word.range(at + KEY_BITS - 1, at);
                const ap_int<QUERY_BITS> element =
                    ap_int<QUERY_BITS>(slice.range(QUERY_BITS * i + QUERY_BITS - 1, QUERY_BITS * i));
                dot += key * element;
            }
            const Score sum = (beat == 0 ? offsets[vector] : sums[vector][lane]) + dot;
            sums[vector][lane] = sum;
            // Of the vectors before this one, sums[0] holds the greatest once the last beat has come.
            const Score best = vector == 0 || sum > sums[0][lane] ? sum : sums[0][lane];
            if (beat == beats - 1) sums[0][lane] = best;
            result.range(32 * lane + 31, 32 * lane) = best;
        }
        const bool last_vector = vector == job.vectors - 1;
        if (last_vector && beat == beats - 1) scores.write(result);
        vector = last_vector ? 0 : vector + 1;
        if (last_vector) beat = beat == beats - 1 ? 0 : beat + 1;
    }
}

}  // namespace
}  // namespace hillinfer

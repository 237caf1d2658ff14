// The tasks that choose among a head's scores: histogram, exact threshold, the pairs written. Of evaluate.cpp alone.
#pragma once

#include "scores.hpp"

namespace hillinfer {
namespace {

struct Threshold {
    Score score;        // the least score chosen
    ap_uint<18> ties;   // how many tokens of exactly that score are chosen
};

// 16 scores of which at least one may be chosen.
struct Candidates {
    Word scores;
    ap_uint<16> lanes;
    uint32_t tile;
    ap_uint<1> last;  // ends the head; holds no candidates
};

// Four counters of bins side by side, each taking every fourth lane: a tile takes four turns. Each turn reads,
// adds and writes back, two cycles if the tool cannot do better: eight a tile, and at a head dimension of 64
// tiles come every eight (INT4) or sixteen (INT8).
struct Tally {
    static const int BANKS = 4;
    static const int TURNS = TILE_TOKENS / BANKS;
    uint32_t counts[BANKS][BINS];
};

void clear(Tally &tally) {
clear:
    for (int bin = 0; bin < BINS; ++bin) {
#pragma HLS PIPELINE II = 1
        for (int bank = 0; bank < Tally::BANKS; ++bank) {
#pragma HLS UNROLL
            tally.counts[bank][bin] = 0;
        }
    }
}

// Counts the valid lanes of one turn; their scores are in the bins of `range`.
void count(Tally &tally, const Word &scores, ap_uint<16> valid, int turn, const Range &range) {
#pragma HLS INLINE
    for (int bank = 0; bank < Tally::BANKS; ++bank) {
#pragma HLS UNROLL
        const int lane = turn * Tally::BANKS + bank;
        const Score score = score_of(scores, lane);
        const ap_uint<BIN_BITS> bin = ap_uint<32>(score - range.low) >> range.shift;
        if (valid[lane]) ++tally.counts[bank][bin];
    }
}

uint32_t total(const Tally &tally, int bin) {
#pragma HLS INLINE
    uint32_t sum = 0;
    for (int bank = 0; bank < Tally::BANKS; ++bank) {
#pragma HLS UNROLL
        sum += tally.counts[bank][bin];
    }
    return sum;
}

// Keeps the scores on chip and counts them. `counts` is an array and not a stream: its reader begins when
// `kept` is whole, so a stream that is shorter than the histogram would lock both up.
void tally_scores(const Job job, hls::stream<Word> &in, hls::stream<Range> &range_in,
                  Word kept[MAX_TOKENS / TILE_TOKENS], uint32_t counts[BINS],
                  hls::stream<uint32_t> &to_memory) {
    Tally tally;
#pragma HLS ARRAY_PARTITION variable = tally.counts complete dim = 1
    const Range range = range_in.read();
    clear(tally);
    Word scores = 0;
tally_scores:
    for (uint32_t step = 0; step < job.tiles * Tally::TURNS; ++step) {
#pragma HLS PIPELINE
        const uint32_t tile = step / Tally::TURNS;
        if (step % Tally::TURNS == 0) {
            scores = in.read();
            kept[tile] = scores;
        }
        count(tally, scores, lanes_of(job, tile), step % Tally::TURNS, range);
    }
send_counts:
    for (int bin = 0; bin < BINS; ++bin) {
#pragma HLS PIPELINE II = 1
        const uint32_t sum = total(tally, bin);
        counts[bin] = sum;
        to_memory.write(sum);
    }
}

void write_histogram(uint32_t head, hls::stream<uint32_t> &in, Word *histograms) {
    const uint64_t start = uint64_t(head) * (BINS / 16);
    Word word = 0;
write_histogram:
    for (int bin = 0; bin < BINS; ++bin) {
#pragma HLS PIPELINE II = 1
        word.range(32 * (bin % 16) + 31, 32 * (bin % 16)) = in.read();
        if (bin % 16 == 15) histograms[start + bin / 16] = word;
    }
}

// Narrows `range` to the bin in which, counted from above, the `wanted`-th score lies; takes from `wanted`
// those above the bin.
void narrow(const uint32_t counts[BINS], Range &range, uint32_t &wanted) {
    uint32_t above = 0;
    bool found = false;
    uint32_t chosen_bin = 0, chosen_above = 0;
narrow:
    for (int bin = BINS - 1; bin >= 0; --bin) {
#pragma HLS PIPELINE II = 1
        const uint32_t with = above + counts[bin];
        if (!found && with >= wanted) {
            found = true;
            chosen_bin = bin;
            chosen_above = above;
        }
        above = with;
    }
    wanted -= chosen_above;
    range.low += Score(chosen_bin << range.shift);
}

// Finds the exact threshold, then passes on the tiles that reach it.
void choose(const Job job, const Word kept[MAX_TOKENS / TILE_TOKENS], const uint32_t counts_in[BINS],
            hls::stream<Range> &range_in, hls::stream<Threshold> &threshold_out,
            hls::stream<Candidates> &out) {
    uint32_t counts[BINS];
    Range range = range_in.read();
    uint32_t wanted = job.chosen();
read_counts:
    for (int bin = 0; bin < BINS; ++bin) {
#pragma HLS PIPELINE II = 1
        counts[bin] = counts_in[bin];
    }
    narrow(counts, range, wanted);
refine:
    while (range.shift > 0) {
#pragma HLS LOOP_TRIPCOUNT min = 0 max = 2
        // Only what is in the bin, 1 << shift wide, is counted again: in bins 2,048 times narrower, or of width 1.
        const ap_uint<32> width = ap_uint<32>(1) << range.shift;
        range.shift = range.shift > BIN_BITS ? ap_uint<5>(range.shift - BIN_BITS) : ap_uint<5>(0);
        Tally tally;
#pragma HLS ARRAY_PARTITION variable = tally.counts complete dim = 1
        clear(tally);
    count_again:
        for (uint32_t step = 0; step < job.tiles * Tally::TURNS; ++step) {
#pragma HLS PIPELINE
            const uint32_t tile = step / Tally::TURNS;
            const Word scores = kept[tile];
            ap_uint<16> inside = lanes_of(job, tile);
            for (int lane = 0; lane < TILE_TOKENS; ++lane) {
#pragma HLS UNROLL
                if (ap_uint<32>(score_of(scores, lane) - range.low) >= width) inside[lane] = 0;
            }
            count(tally, scores, inside, step % Tally::TURNS, range);
        }
        for (int bin = 0; bin < BINS; ++bin) {
#pragma HLS PIPELINE II = 1
            counts[bin] = total(tally, bin);
        }
        narrow(counts, range, wanted);
    }
    const Threshold threshold = {range.low, ap_uint<18>(wanted)};
    threshold_out.write(threshold);
pass_on:
    for (uint32_t tile = 0; tile < job.tiles; ++tile) {
#pragma HLS PIPELINE II = 1
        Candidates candidates = {kept[tile], lanes_of(job, tile), tile, 0};
        for (int lane = 0; lane < TILE_TOKENS; ++lane) {
#pragma HLS UNROLL
            if (score_of(candidates.scores, lane) < threshold.score) candidates.lanes[lane] = 0;
        }
        if (candidates.lanes != 0) out.write(candidates);
    }
    const Candidates end = {0, 0, 0, 1};
    out.write(end);
}

// Drops the ties that came too late, packs (id, score) pairs into words and writes the head's summary.
void write_blocks(const Job job, uint32_t head, hls::stream<Threshold> &threshold_in, hls::stream<Range> &range_in,
                  hls::stream<uint32_t> &checksum_in, hls::stream<Candidates> &in, Word *blocks,
                  Word *summaries) {
    const uint64_t start = uint64_t(head) * ((job.chosen() + PAIRS - 1) / PAIRS);
    const Threshold threshold = threshold_in.read();
    const Range range = range_in.read();
    ap_uint<18> ties = threshold.ties;
    uint32_t filled = 0;
    Word empty;
    for (int pair = 0; pair < PAIRS; ++pair) {
#pragma HLS UNROLL
        empty.range(64 * pair + 63, 64 * pair) = ap_uint<64>(0x80000000ffffffffULL);
    }
    Word word = empty;
    Candidates candidates = in.read();
write_blocks:
    while (!candidates.last) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 131072
        int lane = 0;
        for (int i = TILE_TOKENS - 1; i >= 0; --i) {
#pragma HLS UNROLL
            if (candidates.lanes[i]) lane = i;
        }
        const Score score = score_of(candidates.scores, lane);
        const bool tie = score == threshold.score;
        if (!tie || ties != 0) {
            if (tie) --ties;
            const int pair = filled % PAIRS;
            const ap_uint<32> id = job.first_id + candidates.tile * TILE_TOKENS + lane;
            word.range(64 * pair + 31, 64 * pair) = id;
            word.range(64 * pair + 63, 64 * pair + 32) = score;
            ++filled;
            if (pair == PAIRS - 1) {
                blocks[start + filled / PAIRS - 1] = word;
                word = empty;
            }
        }
        candidates.lanes[lane] = 0;
        if (candidates.lanes == 0) candidates = in.read();
    }
    if (filled % PAIRS != 0) blocks[start + filled / PAIRS] = word;

    Word found = 0;
    found.range(31, 0) = STATUS_OK;
    found.range(63, 32) = filled;
    found.range(95, 64) = checksum_in.read();
    found.range(127, 96) = range.low;
    found.range(159, 128) = range.shift;
    found.range(191, 160) = threshold.score;
    summaries[head] = found;
}

}  // namespace
}  // namespace hillinfer

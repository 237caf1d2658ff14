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

// The tasks of one head run at the same time, and a task begins with the next head as soon as it is done.
template <int KEY_BITS, int QUERY_BITS>
void evaluate_heads(const Word *keys, const Word *queries, Word *blocks, Word *histograms, Word *summaries,
                    uint32_t heads, const Job job) {
    typedef Format<KEY_BITS, QUERY_BITS> F;
    const uint32_t beats = job.dim / F::STEP;
heads:
    for (uint32_t head = 0; head < heads; ++head) {
#pragma HLS DATAFLOW
#pragma HLS LOOP_TRIPCOUNT min = 1 max = 32
        hls::stream<Word> read("read"), checked("checked"), scores("scores");
        hls::stream<Range> range_of_tally("range_of_tally"), range_of_choose("range_of_choose"),
            range_of_summary("range_of_summary");
        hls::stream<uint32_t> checksum("checksum"), counts_out("counts_out");
        hls::stream<Threshold> threshold("threshold");
        hls::stream<Candidates> candidates("candidates");
#pragma HLS STREAM variable = read depth = 64
#pragma HLS STREAM variable = checked depth = 16
#pragma HLS STREAM variable = scores depth = 16
#pragma HLS STREAM variable = range_of_tally depth = 4
#pragma HLS STREAM variable = range_of_choose depth = 4
#pragma HLS STREAM variable = range_of_summary depth = 4
#pragma HLS STREAM variable = checksum depth = 4
#pragma HLS STREAM variable = counts_out depth = 32
#pragma HLS STREAM variable = candidates depth = 32
        typename F::Slice query[MAX_VECTORS * F::MAX_BEATS];
        Score offsets[MAX_VECTORS];
        uint32_t counts[BINS];
#pragma HLS BIND_STORAGE variable = query type = ram_s2p impl = bram
#pragma HLS ARRAY_PARTITION variable = offsets complete
        // Static in simulation alone: 512 KiB is much for a stack.
#ifndef __SYNTHESIS__
        static
#endif
            Word kept[MAX_TOKENS / TILE_TOKENS];
#pragma HLS BIND_STORAGE variable = kept type = ram_s2p impl = uram

        read_keys(keys, job, head, beats, read);
        check_keys(job, beats, read, checked, checksum);
        read_query<F, QUERY_BITS>(queries, job, head, query, offsets, range_of_tally, range_of_choose,
                                  range_of_summary);
        score_tiles<F, KEY_BITS, QUERY_BITS>(job, query, offsets, checked, scores);
        tally_scores(job, scores, range_of_tally, kept, counts, counts_out);
        write_histogram(head, counts_out, histograms);
        choose(job, kept, counts, range_of_choose, threshold, candidates);
        write_blocks(job, head, threshold, range_of_summary, checksum, candidates, blocks, summaries);
    }
}

template <int KEY_BITS, int QUERY_BITS>
void evaluate(const Word *keys, const Word *queries, Word *blocks, Word *histograms, Word *summaries,
              uint32_t heads, uint32_t key_stride, uint32_t tiles, uint32_t begin, uint32_t end,
              uint32_t dim, uint32_t vectors, uint32_t k, uint32_t first_id) {
    if (heads == 0 || tiles > MAX_TOKENS / TILE_TOKENS || end <= begin || end > tiles * TILE_TOKENS ||
        dim == 0 || dim > MAX_DIM || dim % 8 != 0 || vectors == 0 || vectors > MAX_VECTORS || k == 0) {
        summaries[0] = STATUS_BAD_ARGUMENT;
        return;
    }
    const Job job = {key_stride, tiles, begin, end, dim, vectors, k, first_id};
    evaluate_heads<KEY_BITS, QUERY_BITS>(keys, queries, blocks, histograms, summaries, heads, job);
}

}  // namespace
}  // namespace hillinfer

// clang-format off
#define HILLINFER_TOP(NAME, KEY_BITS, QUERY_BITS)                                                                   \
    HILLINFER_EVALUATE(NAME) {                                                                                      \
        _Pragma("HLS INTERFACE m_axi port=keys bundle=keys offset=slave max_read_burst_length=64 num_read_outstanding=32 latency=64") \
        _Pragma("HLS INTERFACE m_axi port=queries bundle=queries offset=slave max_read_burst_length=8")             \
        _Pragma("HLS INTERFACE m_axi port=blocks bundle=blocks offset=slave max_write_burst_length=32")             \
        _Pragma("HLS INTERFACE m_axi port=histograms bundle=histograms offset=slave max_write_burst_length=64")     \
        _Pragma("HLS INTERFACE m_axi port=summaries bundle=blocks offset=slave")                                 \
        _Pragma("HLS INTERFACE s_axilite port=heads")                                                               \
        _Pragma("HLS INTERFACE s_axilite port=key_stride")                                                          \
        _Pragma("HLS INTERFACE s_axilite port=tiles")                                                               \
        _Pragma("HLS INTERFACE s_axilite port=begin")                                                               \
        _Pragma("HLS INTERFACE s_axilite port=end")                                                                 \
        _Pragma("HLS INTERFACE s_axilite port=dim")                                                                 \
        _Pragma("HLS INTERFACE s_axilite port=vectors")                                                             \
        _Pragma("HLS INTERFACE s_axilite port=k")                                                                   \
        _Pragma("HLS INTERFACE s_axilite port=first_id")                                                            \
        _Pragma("HLS INTERFACE s_axilite port=return")                                                              \
        hillinfer::evaluate<KEY_BITS, QUERY_BITS>(keys, queries, blocks, histograms, summaries, heads,              \
                                                  key_stride, tiles, begin, end, dim, vectors, k, first_id);        \
    }

HILLINFER_TOP(evaluate_int8, 8, 8)
HILLINFER_TOP(evaluate_int4, 4, 8)
HILLINFER_TOP(evaluate_int8_q16, 8, 16)

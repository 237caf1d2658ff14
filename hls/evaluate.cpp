#include "evaluate.hpp"
#include "scores.hpp"
#include "selection.hpp"

namespace hillinfer {
namespace {

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

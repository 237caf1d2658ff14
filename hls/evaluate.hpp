// The evaluation kernel: scores of one query over the evaluation keys of several KV heads, and their top-k.
//
// docs/evaluation.md defines every bit of what it computes. Buffers are arrays of 512-bit words (64 bytes):
//
//   keys       head h begins at word h * key_stride: tiles as in docs/evaluation.md. A stride of 0 gives every
//              head the same keys: one "head" for each query head, as guarantee mode wants.
//   queries    head h begins at word h * (1 + vectors * n), n = ceil(dim * query bits / 512): one word with the
//              offsets, of vector r in bits 32r..32r+31, then n words for each vector: dim elements, int8 or
//              int16, in order. The rest of the first word, and of a vector's last one, is ignored.
//   blocks     head h begins at word h * ceil(min(k, end - begin) / 8): (id, score) pairs, 8 to a word, ids
//              ascending; pair p has its id in bits 64p..64p+31 and its score in the next 32. The last word is
//              filled up with id 0xffffffff, score -2^31.
//   histograms head h begins at word h * 128: 2,048 counts of 32 bits.
//   summaries  word h: bits 0-31 status, 32-63 pairs written, 64-95 data checksum, 96-127 low, 128-159 shift,
//              160-191 the least score chosen.
//
// Scalars: heads >= 1; tiles of a head, at most MAX_TOKENS / 16, all of which are read, so that the checksum covers
// them; of these, tokens begin to end (excluded) are scanned, counted from the first token of the keys; dim a
// multiple of 8 up to 256; vectors 1 to 8, of which a token gets the greatest score with its offset; k >= 1; first_id is the id of
// the first token of the keys. If one of them is out of its range, summary word 0 gets STATUS_BAD_ARGUMENT, no
// other word is written and nothing is read.
#pragma once

#include <ap_int.h>
#include <stdint.h>

namespace hillinfer {

typedef ap_uint<512> Word;

const int TILE_TOKENS = 16;
const int MAX_DIM = 256;
const int MAX_VECTORS = 8;
const int MAX_TOKENS = 131072;  // scores of a head on chip, twice: 32 of the card's 104 URAM
const int BIN_BITS = 11;
const int BINS = 1 << BIN_BITS;
const int PAIRS = 8;  // (id, score) in a word of `blocks`

const uint32_t STATUS_OK = 0;
const uint32_t STATUS_BAD_ARGUMENT = 1;

}  // namespace hillinfer

#define HILLINFER_EVALUATE(NAME)                                                                          \
    extern "C" void NAME(const hillinfer::Word *keys, const hillinfer::Word *queries,                     \
                         hillinfer::Word *blocks, hillinfer::Word *histograms, hillinfer::Word *summaries, \
                         uint32_t heads, uint32_t key_stride, uint32_t tiles, uint32_t begin,              \
                         uint32_t end, uint32_t dim, uint32_t vectors, uint32_t k, uint32_t first_id)

HILLINFER_EVALUATE(evaluate_int8);
HILLINFER_EVALUATE(evaluate_int4);
HILLINFER_EVALUATE(evaluate_int8_q16);  // guarantee mode: an INT16 query

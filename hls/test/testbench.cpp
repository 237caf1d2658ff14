// Runs the kernel on every case of a file that vectors.py wrote, and compares every word that it writes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "evaluate.hpp"

using hillinfer::Word;
typedef std::vector<Word> Words;

namespace {

struct Header {
    char name[32];
    uint32_t key_bits, query_bits, heads, key_stride, tiles, begin, end, dim, vectors, k, first_id, key_words;
};

void read_bytes(std::ifstream &file, void *to, size_t size) {
    if (!file.read(static_cast<char *>(to), std::streamsize(size))) {
        std::fprintf(stderr, "the file of vectors ends too early\n");
        std::exit(2);
    }
}

Words read_words(std::ifstream &file, size_t count) {
    std::vector<uint32_t> raw(count * 16);
    read_bytes(file, raw.data(), raw.size() * 4);
    Words words(count);
    for (size_t i = 0; i < raw.size(); ++i) {
        const int bit = int(i % 16) * 32;
        words[i / 16].range(bit + 31, bit) = raw[i];
    }
    return words;
}

bool same(const char *name, const char *what, const Words &found, const Words &expected) {
    for (size_t i = 0; i < expected.size(); ++i)
        for (int word = 0; word < 16; ++word) {
            const uint32_t f = found[i].range(32 * word + 31, 32 * word).to_uint();
            const uint32_t e = expected[i].range(32 * word + 31, 32 * word).to_uint();
            if (f == e) continue;
            std::fprintf(stderr, "%s: %s, word %zu, uint32 %d: 0x%08x instead of 0x%08x\n", name, what, i, word,
                         f, e);
            return false;
        }
    return true;
}

// Exactly as large as they must be, so that the address sanitiser sees a word too many.
struct Outputs {
    Words blocks, histograms, summaries;
};

void launch(const Header &h, const Words &keys, const Words &queries, Outputs &out) {
    auto *kernel = h.key_bits == 4 ? evaluate_int4 : h.query_bits == 16 ? evaluate_int8_q16 : evaluate_int8;
    kernel(keys.data(), queries.data(), out.blocks.data(), out.histograms.data(), out.summaries.data(), h.heads,
           h.key_stride, h.tiles, h.begin, h.end, h.dim, h.vectors, h.k, h.first_id);
}

bool run_case(std::ifstream &file, const Header &h) {
    const Words keys = read_words(file, h.key_words);
    const Words queries = read_words(file, size_t(h.heads) * (1 + h.vectors * ((h.dim * h.query_bits + 511) / 512)));
    const size_t chosen = std::min(h.k, h.end - h.begin);
    const Words blocks = read_words(file, h.heads * ((chosen + hillinfer::PAIRS - 1) / hillinfer::PAIRS));
    const Words histograms = read_words(file, size_t(h.heads) * hillinfer::BINS / 16);
    const Words summaries = read_words(file, h.heads);
    Outputs out = {Words(blocks.size()), Words(histograms.size()), Words(summaries.size())};
    launch(h, keys, queries, out);
    return same(h.name, "blocks", out.blocks, blocks) &&
           same(h.name, "histograms", out.histograms, histograms) &&
           same(h.name, "summaries", out.summaries, summaries);
}

// Empty buffers, apart from one summary: a bad argument must be told before anything is touched.
bool refuses_bad_arguments() {
    Header good = {"bad-argument", 8, 8, 1, 1, 1, 0, 16, 8, 1, 1, 0, 0};
    std::vector<Header> bad(13, good);
    bad[0].heads = 0;
    bad[1].begin = 16;
    bad[2].begin = 5, bad[2].end = 5;
    bad[3].end = 17;
    bad[4].dim = 0;
    bad[5].dim = 12;
    bad[6].dim = 264;
    bad[7].vectors = 0;
    bad[8].vectors = 9;
    bad[9].k = 0;
    bad[10].end = 0;
    bad[11].tiles = hillinfer::MAX_TOKENS / hillinfer::TILE_TOKENS + 1;
    bad[12].tiles = 0x10000001;  // times 16, it wraps round to 16
    for (size_t i = 0; i < bad.size(); ++i) {
        Outputs out = {Words(), Words(), Words(1)};
        launch(bad[i], Words(), Words(), out);
        if (out.summaries[0] != hillinfer::STATUS_BAD_ARGUMENT) {
            std::fprintf(stderr, "bad argument %zu was not refused\n", i);
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 2;
    }
    std::ifstream file(argv[1], std::ios::binary);
    int passed = 0, failed = refuses_bad_arguments() ? 0 : 1;
    while (file.peek() != std::ifstream::traits_type::eof()) {
        Header header;
        read_bytes(file, &header, sizeof header);
        header.name[sizeof header.name - 1] = 0;
        ++(run_case(file, header) ? passed : failed);
    }
    std::printf("csim: %d cases agree with hillinfer_core.reference, %d do not\n", passed, failed);
    return failed != 0 || passed == 0;
}

// Loads mutated GGUFs over and over, and decodes with those that load, by the one graph or the other.
//
//   fuzz_load SECONDS SEED THREADS WORK_FILE GGUF...
//
// Beside each GGUF lies GGUF.ranges: lines "begin end", the bytes that may be changed. With SECONDS 0
// every file is run once as it is. A crash is what the sanitizers, an assertion or a signal make of
// it; WORK_FILE is then the input that did it. Ends with a line of counts.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

struct seed_file {
    std::vector<char> bytes;
    std::vector<std::pair<size_t, size_t>> ranges;
};

static std::mt19937_64 rng;

static size_t below(size_t n) {
    return n ? rng() % n : 0;
}

static seed_file read_seed(const std::string & path) {
    seed_file seed;
    std::ifstream file(path, std::ios::binary);
    seed.bytes.assign(std::istreambuf_iterator<char>(file), {});
    std::ifstream ranges(path + ".ranges");
    for (size_t begin, end; ranges >> begin >> end; ) {
        seed.ranges.emplace_back(begin, end);
    }
    return seed;
}

// numbers that loaders get wrong
static int64_t interesting() {
    static const int64_t values[] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32, 33, 64, 127, 128, 255, 256, 65535, 65536,
        -1, -2, -8, INT32_MAX, INT32_MIN, UINT32_MAX, INT64_MAX, INT64_MIN, int64_t(1) << 32, int64_t(1) << 61,
    };
    return values[below(sizeof(values)/sizeof(values[0]))];
}

static void mutate(const seed_file & seed, std::vector<char> & bytes) {
    bytes = seed.bytes;
    for (size_t n = below(2) ? 1 : 1 + below(3); n > 0; n--) {
        const auto [begin, end] = seed.ranges[below(seed.ranges.size())];
        const size_t at = begin + below(end - begin);
        switch (below(6)) {
            case 5: { // numbers trade places: orders of experts, kept counts, dimensions
                const size_t width = below(2) ? 4 : 8;
                const size_t words = (end - begin)/width;
                char * a = bytes.data() + end - width*(1 + below(words));
                char * b = bytes.data() + end - width*(1 + below(words));
                std::swap_ranges(a, words ? a + width : a, b);
                break;
            }
            case 0: bytes[at] ^= char(1 << below(8)); break;
            case 1: bytes[at]  = char(rng());         break;
            case 2: bytes[at] += char(below(2) ? 1 : -1); break;
            default: {
                const int64_t value = interesting();
                const size_t width = std::min<size_t>(below(2) ? 4 : 8, end - at);
                memcpy(bytes.data() + at, &value, width);
            }
        }
    }
    if (below(20) == 0) {
        bytes.resize(below(bytes.size()));
    }
}

static bool decode(llama_model * model, int n_tokens, int n_threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 128;
    params.n_batch = params.n_ubatch = 96;
    params.n_threads = params.n_threads_batch = n_threads;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return false;
    }
    std::vector<llama_token> tokens(n_tokens);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (auto & token : tokens) {
        token = int(below(n_vocab));
    }
    const bool ok = llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens)) == 0;
    llama_free(ctx);
    return ok;
}

static llama_model * load(const char * path, bool mmap) {
    llama_model_params params = llama_model_default_params();
    params.load_mode = mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    return llama_model_load_from_file(path, params);
}

int main(int argc, char ** argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: %s SECONDS SEED THREADS WORK_FILE GGUF...\n", argv[0]);
        return 2;
    }
    const double seconds   = atof(argv[1]);
    const int    n_threads = atoi(argv[3]);
    const char * work      = argv[4];
    rng.seed(strtoull(argv[2], nullptr, 10));
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    size_t n_run = 0, n_loaded = 0, n_decoded = 0;

    if (seconds <= 0) {
        for (int i = 5; i < argc; i++) {
            llama_model * model = load(argv[i], true);
            n_run++;
            n_loaded += model != nullptr;
            for (int n_tokens : { 1, 5, 96 }) {
                n_decoded += model && decode(model, n_tokens, n_threads);
            }
            llama_model_free(model);
        }
    } else {
        std::vector<seed_file> seeds;
        for (int i = 5; i < argc; i++) {
            seeds.push_back(read_seed(argv[i]));
        }
        std::vector<char> bytes;
        // processor time, all threads: a machine that is shared does not make the run shorter
        const std::clock_t start = std::clock();
        while (double(std::clock() - start)/CLOCKS_PER_SEC < seconds) {
            mutate(seeds[below(seeds.size())], bytes);
            std::ofstream(work, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
            llama_model * model = load(work, below(2));
            n_run++;
            if (model) {
                n_loaded++;
                setenv("LLAMA_MOE_SKIP_DISABLE", below(2) ? "1" : "0", 1);
                n_decoded += decode(model, 1 + int(below(40)), n_threads);
                llama_model_free(model);
            }
        }
    }
    llama_backend_free();
    printf("%zu files, %zu loaded, %zu batches decoded\n", n_run, n_loaded, n_decoded);
    return 0;
}

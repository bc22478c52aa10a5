// Logits of a GGUF on another machine than the one that Python runs on.
//
// usage: logits MODEL TOKENS OUT GPU_LAYERS N:THREADS...
//
// TOKENS is a file of int32. For each N:THREADS the first N of them are one batch in a new context,
// with keys and values in F32 and plain attention; the logits [N, vocabulary], float32, are appended
// to OUT. llama.cpp's log goes to stderr. Exit code 3: the model does not load.

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

static void show(enum ggml_log_level level, const char * text, void * user_data) {
    (void) level;
    (void) user_data;
    fputs(text, stderr);
}

static int run(struct llama_model * model, const llama_token * tokens, int n_tokens, int n_threads, FILE * out) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_batch = params.n_ubatch = n_tokens > 32 ? n_tokens : 32;
    params.n_threads = params.n_threads_batch = n_threads;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;

    struct llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 4;
    }
    struct llama_batch batch = llama_batch_init(n_tokens, 0, 1);
    batch.n_tokens = n_tokens;
    for (int i = 0; i < n_tokens; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.logits[i] = 1;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
    }
    int failed = llama_decode(context, batch) != 0;
    if (!failed) {
        size_t count = (size_t) n_tokens * llama_vocab_n_tokens(llama_model_get_vocab(model));
        failed = fwrite(llama_get_logits(context), sizeof(float), count, out) != count;
    }
    llama_batch_free(batch);
    llama_free(context);
    return failed ? 5 : 0;
}

int main(int argc, char ** argv) {
    enum { MAX_TOKENS = 256 };
    static llama_token tokens[MAX_TOKENS];

    if (argc < 6) {
        return 2;
    }
    FILE * in = fopen(argv[2], "rb");
    FILE * out = fopen(argv[3], "wb");
    if (!in || !out) {
        return 2;
    }
    int n_given = (int) fread(tokens, sizeof(tokens[0]), MAX_TOKENS, in);

    llama_log_set(show, NULL);
    llama_backend_init();
    struct llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = atoi(argv[4]);
    struct llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        return 3;
    }
    int result = 0;
    for (int i = 5; i < argc && result == 0; i++) {
        int n_tokens, n_threads;
        if (sscanf(argv[i], "%d:%d", &n_tokens, &n_threads) != 2 || n_tokens > n_given) {
            return 2;
        }
        result = run(model, tokens, n_tokens, n_threads, out);
    }
    llama_model_free(model);
    return fclose(out) != 0 ? 5 : result;
}

// Runs token ids through llama.cpp, plainly or with a drafted chain, and says how long it took.
//
// Built against the sources of llama.cpp by `specinfer_bench.peers.build_llama_cpp`. The speculative
// loop makes the calls of llama.cpp's own example `speculative-simple`, in its order; the models
// stay loaded between runs. One line in is one run:
//     MODE DRAFT_MAX MAX_TOKENS TEMPERATURE SEED COUNT ID...    MODE is plain or chain
// and one line out is its answer, on stdout where nothing else is written:
//     ok FIRST_SECONDS SECONDS COUNT ID...                      or: error TEXT
// It knows nothing of text, prompts or servers.

#include "arg.h"
#include "common.h"
#include "llama.h"
#include "log.h"
#include "sampling.h"
#include "speculative.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Request {
    std::string mode;
    int draft_max = 0;
    int max_tokens = 0;
    float temperature = 0.0f;
    uint32_t seed = 0;
    llama_tokens prompt;
};

struct Answer {
    int64_t first_us = 0;
    int64_t end_us = 0;
    llama_tokens tokens;
};

struct Models {
    llama_model * target;
    llama_context * ctx_target;
    llama_context * ctx_draft;
    common_speculative * speculative;
};

Request read_request(const std::string & line) {
    std::istringstream input(line);
    Request request;
    size_t count = 0;
    input >> request.mode >> request.draft_max >> request.max_tokens >> request.temperature
          >> request.seed >> count;
    if (!input || count < 2 || count > 65536 || request.max_tokens < 1) {
        throw std::runtime_error("a line that is no request");
    }
    request.prompt.resize(count);
    for (auto & id : request.prompt) {
        input >> id;
    }
    if (!input || (request.mode != "plain" && request.mode != "chain")) {
        throw std::runtime_error("a line that is no request");
    }
    return request;
}

common_sampler_ptr make_sampler(const Models & models, const Request & request) {
    common_params_sampling params;
    params.seed = request.seed;
    params.temp = request.temperature;
    // The whole distribution at this temperature, as the other arms draw from it.
    params.samplers = { COMMON_SAMPLER_TYPE_TEMPERATURE };
    return common_sampler_ptr(common_sampler_init(models.target, params));
}

void decode(llama_context * ctx, common_batch & batch) {
    if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch.get()) != 0) {
        throw std::runtime_error("llama.cpp could not decode a batch");
    }
}

// Takes one token; whether it was the last one.
bool take(const Models & models, const Request & request, Answer & answer, llama_token id) {
    if (answer.tokens.empty()) {
        answer.first_us = ggml_time_us();
    }
    answer.tokens.push_back(id);
    return llama_vocab_is_eog(llama_model_get_vocab(models.target), id)
        || (int) answer.tokens.size() >= request.max_tokens;
}

Answer run_plain(const Models & models, const Request & request) {
    auto sampler = make_sampler(models, request);
    Answer answer;
    common_batch batch(models.ctx_target);
    for (size_t i = 0; i < request.prompt.size(); ++i) {
        batch.add(request.prompt[i], i, 0, i + 1 == request.prompt.size());
    }
    int position = request.prompt.size();
    while (true) {
        decode(models.ctx_target, batch);
        const llama_token id = common_sampler_sample(sampler.get(), models.ctx_target, -1);
        common_sampler_accept(sampler.get(), id, true);
        if (take(models, request, answer, id)) {
            return answer;
        }
        batch.clear();
        batch.add(id, position++, 0, true);
    }
}

llama_tokens make_draft(
    const Models & models, int position, llama_token last, const llama_tokens & known, int n_max
) {
    llama_tokens draft;
    if (n_max < 1) {
        return draft;
    }
    common_speculative_get_draft_params(models.speculative, 0) = {
        true, n_max, position, last, &known, &draft,
    };
    common_speculative_draft(models.speculative);
    llama_memory_seq_rm(llama_get_memory(models.ctx_draft), 0, position, -1);
    return draft;
}

Answer run_chain(const Models & models, const Request & request) {
    auto sampler = make_sampler(models, request);
    Answer answer;
    common_batch batch(models.ctx_target);
    llama_tokens known(request.prompt.begin(), request.prompt.end() - 1);
    for (size_t i = 0; i < known.size(); ++i) {
        batch.add(known[i], i, 0, false);
    }
    decode(models.ctx_target, batch);
    common_speculative_process(models.speculative, batch);
    common_speculative_begin(models.speculative, 0, known);
    llama_token last = request.prompt.back();
    while (true) {
        const int position = known.size();
        const int left = request.max_tokens - (int) answer.tokens.size() - 1;
        auto draft = make_draft(models, position, last, known, std::min(request.draft_max, left));
        batch.clear();
        batch.add(last, position, 0, true);
        for (size_t i = 0; i < draft.size(); ++i) {
            batch.add(draft[i], position + 1 + i, 0, true);
        }
        decode(models.ctx_target, batch);
        common_speculative_process(models.speculative, batch);
        const auto ids =
            common_sampler_sample_and_accept_n(sampler.get(), models.ctx_target, draft);
        common_speculative_accept(models.speculative, 0, ids.size() - 1);
        for (const llama_token id : ids) {
            known.push_back(last);
            last = id;
            if (take(models, request, answer, id)) {
                return answer;
            }
        }
        llama_memory_seq_rm(llama_get_memory(models.ctx_target), 0, known.size(), -1);
        llama_memory_seq_rm(llama_get_memory(models.ctx_draft), 0, known.size(), -1);
    }
}

void answer_line(const Models & models, const std::string & line) {
    const Request request = read_request(line);
    for (auto * ctx : { models.ctx_target, models.ctx_draft }) {
        llama_memory_clear(llama_get_memory(ctx), true);
    }
    const int64_t begin_us = ggml_time_us();
    Answer answer = request.mode == "plain" ? run_plain(models, request) : run_chain(models, request);
    answer.end_us = ggml_time_us();
    std::printf(
        "ok %.6f %.6f %zu", (answer.first_us - begin_us) / 1e6, (answer.end_us - begin_us) / 1e6,
        answer.tokens.size()
    );
    for (const llama_token id : answer.tokens) {
        std::printf(" %d", id);
    }
    std::printf("\n");
}

}  // namespace

int main(int argc, char ** argv) {
    common_params params;
    common_init();
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_SPECULATIVE)) {
        return 1;
    }
    const auto limits = common_speculative_get_output_limits(
        params.n_batch, params.n_parallel, common_speculative_n_max(&params.speculative)
    );
    params.n_outputs_max = limits.total;
    params.n_outputs_max_per_seq = limits.per_seq;
    llama_backend_init();
    auto target = common_init_from_params(params);
    common_params draft_params = common_base_params_to_speculative(params);
    auto draft =
        common_speculative_init_from_params(draft_params, target->model(), target->context());
    params.speculative.draft.ctx_tgt = target->context();
    params.speculative.draft.ctx_dft = draft->context();
    common_speculative_ptr speculative(common_speculative_init(params.speculative, 1));
    if (!speculative || !target->context() || !draft->context()) {
        std::printf("error the models cannot be loaded\n");
        return 1;
    }
    const Models models = {
        target->model(), target->context(), draft->context(), speculative.get(),
    };
    std::printf("ready\n");
    std::fflush(stdout);
    for (std::string line; std::getline(std::cin, line);) {
        try {
            answer_line(models, line);
        } catch (const std::exception & failure) {
            std::printf("error %s\n", failure.what());
        }
        std::fflush(stdout);
    }
    speculative.reset();
    llama_backend_free();
    return 0;
}

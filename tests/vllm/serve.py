"""One vLLM engine in a process of its own: `python serve.py SCENARIOS plain|SPECULATIVE_CONFIG MODEL OUTPUT RANKS
DTYPE`.

It writes what was generated and what the engine counted as JSON. `test_vllm.py` compares the runs.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK = 32
LONG = (
    "The harbour office keeps a list of every ship that came in during the storm, with its captain and its cargo. " * 4
)


def prompts() -> list[str]:
    from firp.tools.prompt_files import OWN_PROMPTS, load_prompts

    return [prompt.turns[0] for prompt in load_prompts(OWN_PROMPTS, 24)]


def counters(llm) -> dict[str, float]:
    return {metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy(llm, SamplingParams) -> dict:
    """24 prompts; stops and limits inside a run; penalties; a grammar; a prefix that comes again."""
    from vllm.sampling_params import StructuredOutputsParams

    found = {}
    before = counters(llm)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts()]
    found["greedy"] = tokens(llm.chat(asked, SamplingParams(temperature=0, max_tokens=40)))
    after = counters(llm)
    found["drafts"] = {
        name: after[name] - before[name]
        for name in ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
        if name in after
    }
    repeat = "1, 2, 3, 4, 5, 6, 7, 8,"
    found["limits"] = tokens(
        llm.generate([repeat] * 9, [SamplingParams(temperature=0, max_tokens=n) for n in range(1, 10)])
    )
    ends = llm.generate(
        [repeat] * 4,
        [SamplingParams(temperature=0, max_tokens=40, stop=[stop]) for stop in (" 12", "3,", "1", ", 15, 1")],
    )
    found["stops"] = [[*rows, end.outputs[0].text] for rows, end in zip(tokens(ends), ends, strict=True)]
    varied = [
        {"repetition_penalty": 1.3}, {"frequency_penalty": 0.7, "presence_penalty": 0.2}, {"min_tokens": 20},
        {"logprobs": 2}, {"bad_words": [" 11"]}, {"stop_token_ids": [28]},
        {"structured_outputs": StructuredOutputsParams(regex=r"( [0-9]+,){6}")},
        {"structured_outputs": StructuredOutputsParams(choice=[" nine, ten", " 9, 10"])},
    ]  # fmt: skip
    found["options"] = tokens(
        llm.generate([repeat] * len(varied), [SamplingParams(temperature=0, max_tokens=24, **o) for o in varied])
    )
    before = counters(llm)
    for name in ("first", "again"):
        found[name] = tokens(llm.generate([LONG, LONG + "The"], SamplingParams(temperature=0, max_tokens=24)))
    after = counters(llm)
    found["prefix_hits"] = after["prefix_cache_hits"] - before["prefix_cache_hits"]
    return found


def arrivals(llm, SamplingParams) -> dict:
    """Requests that come and go one by one, in a cache too small for them."""
    engine, texts = llm.llm_engine, [*prompts()[:10], LONG, LONG[9:]]
    found, step, given = {}, 0, 0
    while given < len(texts) or engine.has_unfinished_requests():
        if given < len(texts) and step % 2 == 0:
            params = SamplingParams(temperature=0, max_tokens=30 + 13 * (given % 4), ignore_eos=True)
            engine.add_request(str(given), texts[given], params)
            given += 1
        if step in (9, 14):
            engine.abort_request([str(step // 5)])
        for output in engine.step():
            if output.finished and str(output.request_id) not in ("1", "2"):
                found[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return {"arrivals": found, "preemptions": counters(llm)["num_preemptions"]}


def scored(llm, SamplingParams) -> dict:
    """24 prompts with the logarithms of the best tokens' probabilities at each place."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts()]
    ends = [output.outputs[0] for output in llm.chat(asked, SamplingParams(temperature=0, max_tokens=40, logprobs=5))]
    return {
        "scored": [list(end.token_ids) for end in ends],
        "logprobs": [
            [{token: given.logprob for token, given in place.items()} for place in end.logprobs] for end in ends
        ],
    }


def short(llm, SamplingParams) -> dict:
    """A few tokens of a few prompts."""
    found = tokens(llm.generate(prompts()[:4], SamplingParams(temperature=0, max_tokens=8)))
    return {"short": found, "drafts": counters(llm).get("spec_decode_num_drafts")}


def beside(llm, SamplingParams) -> dict:
    """What stands beside other requests: greedy ones among sampled ones, several answers, logprobs, the longest."""
    asked = by_ids(10)
    options = {"temperature": 0, "max_tokens": 30, "detokenize": False, "ignore_eos": True}
    mixed = [SamplingParams(**options | {"temperature": i % 2, "top_k": (0, 5)[i % 4 == 3]}) for i in range(10)]
    several = llm.generate(asked[:4], SamplingParams(**options, n=3))
    told = llm.generate(asked, SamplingParams(**options, logprobs=3, prompt_logprobs=2))
    return {
        "greedy among sampled": tokens(llm.generate(asked, mixed))[::2],
        "several": [[list(answer.token_ids) for answer in output.outputs] for output in several],
        "logprobs": [
            [place and sorted((token, round(given.logprob, 3)) for token, given in place.items()) for place in places]
            for output in told
            for places in (output.prompt_logprobs, output.outputs[0].logprobs)
        ],
        "longest": tokens(llm.generate(asked, SamplingParams(**options | {"max_tokens": None}))),
        "allowed": tokens(llm.generate(asked, SamplingParams(**options, allowed_token_ids=list(range(9, 40))))),
        "preemptions": counters(llm)["num_preemptions"],
    }


def by_ids(count: int) -> list:
    from vllm import TokensPrompt

    return [TokensPrompt(prompt_token_ids=[4 + i, 9, 4 + 2 * i] * (1 + i % 5)) for i in range(count)]


def sampled(llm, SamplingParams) -> dict:
    """Many samples of one prompt."""
    from vllm import TokensPrompt

    found = {}
    for name, options in json.loads(os.environ["SAMPLING"]).items():
        params = SamplingParams(
            **{"temperature": 1.0, "max_tokens": 4, "detokenize": False, "stop_token_ids": [3], **options}
        )
        found[name] = tokens(llm.generate([TokensPrompt(prompt_token_ids=[4])] * 3000, params, use_tqdm=False))
    return found | {"drafts": counters(llm)}


def by_tokens(llm, SamplingParams) -> dict:
    """Greedy tokens of a model without a tokenizer."""
    params = SamplingParams(temperature=0, max_tokens=30, detokenize=False, ignore_eos=True)
    found = tokens(llm.generate(by_ids(12), params))
    counted = counters(llm)
    return {
        "tokens": found,
        "drafts": {name: value for name, value in counted.items() if name.startswith("spec_decode")},
    }


TINY = {"max_num_seqs": 6, "max_model_len": 64, "skip_tokenizer_init": True}
ENGINES = {
    "tokens": (by_tokens, TINY),
    "beside": (beside, TINY),
    "crowded": (beside, TINY | {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 6}),
    "short": (short, {"max_num_seqs": 4, "max_model_len": 64}),
    "scored": (scored, {"max_num_seqs": 8, "max_model_len": 320}),
    "greedy": (greedy, {"max_num_seqs": 8, "max_model_len": 320}),
    "arrivals": (arrivals, {"max_num_seqs": 6, "max_model_len": 320, "num_gpu_blocks_override": 16}),
    "sampled": (sampled, {"max_num_seqs": 64, "max_model_len": 64, "skip_tokenizer_init": True}),
}


def main() -> None:
    scenarios, speculative, model, output, ranks, dtype = sys.argv[1:]
    parallel = int(ranks)
    if parallel == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    found = {}
    for name in scenarios.split(","):
        run, options = ENGINES[name]
        llm = LLM(
            model, dtype=dtype, enforce_eager=True, block_size=BLOCK, disable_log_stats=False,
            speculative_config=None if speculative == "plain" else json.loads(speculative),
            tensor_parallel_size=parallel, **options,
        )  # fmt: skip
        found |= run(llm, SamplingParams)
        del llm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

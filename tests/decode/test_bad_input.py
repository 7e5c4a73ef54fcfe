"""Every bad input gets one error that names the field, what was given and what is expected."""

import firp
import pytest
import torch
from firp.drafting.predictor import default_predictor, load_predictor
from firp.engine.engine import Engine
from firp.engine.prefill import check_prompts
from firp.tools.models import parse_dtype
from firp.tools.prompt_files import load_prompts
from models import tiny_model, tiny_predictor
from transformers import DynamicCache, LogitsProcessor, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

IDS = torch.tensor([[4, 5, 6]])
PAIR = torch.tensor([[4, 5, 6], [6, 5, 4]])


class World:
    """What the cases need: a model with drafts, another model, files."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny_model(1)
        self.other = tiny_model(2, vocab=9)
        self.predictor = tiny_predictor(self.model, 1)
        (folder / "lines.jsonl").write_text('{"prompt": "x"}\n{"prompt": 3}\n')
        (folder / "empty.jsonl").write_text("\n")
        (folder / "latin.jsonl").write_bytes(b"\xff\xfe")
        (folder / "half").mkdir()
        (folder / "half/config.json").write_text("{}")

    def generate(self, ids=IDS, **options):
        return firp.generate(
            self.model, ids, **{"max_new_tokens": 4, "do_sample": False, "predictor": self.predictor, **options}
        )

    def engine(self, **sizes):
        return Engine(self.model, self.predictor, **sizes)


def trained(**changes):
    return firp.FirpPredictor(
        **{"num_offsets": 2, "hidden_size": 8, "insertion_layer": 1, "num_layers": 4, "vocab_size": 9, **changes}
    )


def paths(*given, nodes=None, kind="static"):
    return firp.TreeConfig(nodes or len(given) + 1, 1, kind, tuple(given))


def filled_cache(model):
    return model(IDS, past_key_values=DynamicCache(config=model.config)).past_key_values


def autocast(world):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        world.generate()


class Stateful(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class NoStreamer(BaseStreamer):
    put = end = lambda self, *_: None


CASES = {
    "empty prompt": (lambda w: w.generate(torch.empty(1, 0, dtype=torch.long)), ValueError, "input_ids: got an empty prompt in row 0, expected at least one token"),
    "prompt of padding alone": (lambda w: w.generate(PAIR, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), ValueError, "input_ids: got an empty prompt in row 1, expected at least one token"),
    "prompts as lists": (lambda w: w.generate([[4, 5]]), ValueError, "input_ids: got list, expected a tensor [B, T]"),
    "prompt of one dimension": (lambda w: w.generate(IDS[0]), ValueError, "input_ids: got shape (3,), expected [B, T]"),
    "prompt of three dimensions": (lambda w: w.model.generate(IDS[None], custom_generate=firp.decode, max_new_tokens=4), ValueError, "input_ids: got shape (1, 1, 3), expected [B, T]"),
    "prompt of floats": (lambda w: w.generate(IDS.float()), ValueError, "input_ids: got dtype torch.float32, expected integers"),
    "token past the vocabulary": (lambda w: w.generate(torch.tensor([[4, 7]])), ValueError, "input_ids: got token 7, expected 0..6 (the model's embeddings)"),
    "negative token": (lambda w: w.generate(torch.tensor([[4, -1]])), ValueError, "input_ids: got token -1, expected 0..6 (the model's embeddings)"),
    "mask as a list": (lambda w: w.generate(IDS, attention_mask=[[1, 1, 1]]), ValueError, "attention_mask: got list, expected a tensor (1, 3) (input_ids)"),
    "mask of another shape": (lambda w: w.generate(IDS, attention_mask=torch.ones(1, 2, dtype=torch.long)), ValueError, "attention_mask: got shape (1, 2), expected (1, 3) (input_ids)"),
    "past the context": (lambda w: w.generate(max_new_tokens=300), ValueError, "max_new_tokens: got 300 after a prompt of 3 tokens, expected at most 253: the model's context holds 256"),
    "prompt past the context": (lambda w: w.generate(torch.full((1, 256), 4), max_new_tokens=1), ValueError, "input_ids: got a prompt of 256 tokens, expected at most 255: the model's context holds 256, a new token included"),
    "no new tokens": (lambda w: check_prompts(w.model.config, [3], 0), ValueError, "max_new_tokens: got 0, expected at least 1"),
    "no prompts": (lambda w: check_prompts(w.model.config, [], 3), ValueError, "input_ids: got no prompts, expected at least one"),
    "batch of no prompts": (lambda w: w.generate(torch.empty(0, 3, dtype=torch.long)), ValueError, "input_ids: got no prompts, expected at least one"),
    "positions of one's own": (lambda w: w.generate(position_ids=torch.tensor([[3, 4, 5]])), ValueError, "position_ids: got positions of their own, expected none: every prompt starts at position 0"),
    "embeddings": (lambda w: w.generate(None, inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64)), ValueError, "inputs_embeds: a model input that FIRP does not support, expected only input_ids and attention_mask"),
    "embeddings beside tokens": (lambda w: w.generate(None, input_ids=IDS, inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64)), ValueError, "inputs_embeds: a model input that FIRP does not support, expected only input_ids and attention_mask"),
    "filled cache": (lambda w: w.generate(past_key_values=filled_cache(w.model)), ValueError, "past_key_values: got a cache of 3 tokens, expected none: FIRP decodes over a static cache of its own; pass the whole prompt"),
    "streamer with a batch": (lambda w: w.generate(PAIR, streamer=NoStreamer()), ValueError, "streamer: got a batch of 2 sequences, expected 1"),
    "no streamer": (lambda w: w.generate(streamer=print), ValueError, "streamer: got builtin_function_or_method, expected an object with put() and end()"),
    "no callback": (lambda w: w.generate(on_step=3), ValueError, "on_step: got int, expected a function of a StepEvent"),
    "no model": (lambda w: firp.generate("smollm2-135m", IDS), ValueError, "model: got str, expected a Hugging Face causal language model"),
    "model without a head": (lambda w: firp.generate(w.model.model, IDS), ValueError, "model: got LlamaModel, expected a Hugging Face causal language model"),
    "compiled model": (lambda w: Engine(torch.compile(w.model)), ValueError, "model: got OptimizedModule of torch.compile, expected the model inside it: pass model._orig_mod; Engine(compile=True) compiles its layers"),
    "configuration as a dictionary": (lambda w: w.generate(generation_config={"top_k": 3}), ValueError, "generation_config: got dict, expected a GenerationConfig"),
    "one processor": (lambda w: w.generate(logits_processor=Stateful()), ValueError, "logits_processor: got Stateful, expected a list"),
    "one criterion": (lambda w: w.generate(stopping_criteria=MaxTimeCriteria(3.0)), ValueError, "stopping_criteria: got MaxTimeCriteria, expected a list"),
    "criterion over a batch": (lambda w: w.generate(PAIR, stopping_criteria=[lambda *_: torch.tensor([False, True])]), ValueError, "stopping_criteria: got 2 answers, expected 1: they are asked about one sequence at a time"),
    "seed of a float": (lambda w: w.generate(seed=1.5), ValueError, "seed: got 1.5, expected an integer of 64 bits, or None"),
    "seed too large": (lambda w: w.generate(seed=2**63, do_sample=True), ValueError, "seed: got 9223372036854775808, expected an integer of 64 bits, or None"),
    "autocast": (autocast, ValueError, "autocast: got torch.autocast('cpu', torch.bfloat16), expected none: load the model in that dtype"),
    "assistant model": (lambda w: w.generate(assistant_model=w.other), ValueError, "assistant_model: got LlamaForCausalLM, expected None: FIRP is the drafter here"),
    "assistant tokenizer": (lambda w: w.generate(assistant_tokenizer=NoStreamer()), ValueError, "assistant_tokenizer: got NoStreamer, expected None: FIRP is the drafter here"),
    "custom generate": (lambda w: w.generate(custom_generate=firp.decode), ValueError, "custom_generate: got function, expected None: FIRP decodes this call already; pass it to type(model).generate instead"),
    "synced GPUs": (lambda w: w.generate(synced_gpus=True), ValueError, "synced_gpus: got True, expected None: every process would have to step alike"),
    "stop strings alone": (lambda w: w.generate(stop_strings=["x"]), ValueError, "tokenizer: got None, expected the model's tokenizer, which stop_strings needs"),
    "engine and predictor": (lambda w: w.generate(engine=w.engine()), ValueError, "engine: given with predictor or tree, expected one or the other: the engine has its own"),
    "engine and tree": (lambda w: firp.generate(w.model, IDS, engine=w.engine(), tree=firp.TreeConfig(4, 1), max_new_tokens=4), ValueError, "engine: given with predictor or tree, expected one or the other: the engine has its own"),
    "engine by name": (lambda w: firp.generate(w.model, IDS, engine="fast"), ValueError, "engine: got str, expected a firp.Engine"),
    "engine of another model": (lambda w: firp.generate(w.other, IDS, engine=w.engine(), max_new_tokens=4), ValueError, "engine: was made for another model object"),
    "beams": (lambda w: w.generate(num_beams=2), ValueError, "num_beams: got 2, expected None or 1: FIRP follows one sequence at a time; call type(model).generate without custom_generate for beams"),
    "beam groups": (lambda w: w.generate(num_beam_groups=2), ValueError, "num_beam_groups: got 2, expected None or 1: FIRP follows one sequence at a time; call type(model).generate without custom_generate for beams"),
    "diversity": (lambda w: w.generate(diversity_penalty=0.5), ValueError, "diversity_penalty: got 0.5, expected None or 0.0: FIRP follows one sequence at a time; call type(model).generate without custom_generate for beams"),
    "forced words": (lambda w: w.generate(force_words_ids=[[4]]), ValueError, "force_words_ids: got [[4]], expected None: FIRP follows one sequence at a time; call type(model).generate without custom_generate for beams"),
    "contrastive search": (lambda w: w.generate(penalty_alpha=0.6), ValueError, "penalty_alpha: got 0.6, expected None or 0.0: contrastive search is not supported; call type(model).generate without custom_generate"),
    "low memory": (lambda w: w.generate(low_memory=True), ValueError, "low_memory: got True, expected None or False: it belongs to contrastive search, which is not supported"),
    "DoLa": (lambda w: w.generate(dola_layers="high"), ValueError, "dola_layers: got 'high', expected None: DoLa is not supported; call type(model).generate without custom_generate"),
    "prompt lookup": (lambda w: w.generate(prompt_lookup_num_tokens=3), ValueError, "prompt_lookup_num_tokens: got 3, expected None: FIRP is the drafter here; call type(model).generate without custom_generate for another one"),
    "early exit": (lambda w: w.generate(assistant_early_exit=2), ValueError, "assistant_early_exit: got 2, expected None: FIRP is the drafter here; call type(model).generate without custom_generate for another one"),
    "an assistant itself": (lambda w: w.generate(is_assistant=True), ValueError, "is_assistant: got True, expected None or False: a FIRP model cannot be the assistant of another"),
    "own drafter of the model": (lambda w: w.generate(use_mtp=True), ValueError, "use_mtp: got True, expected None or False: FIRP is the drafter here; call type(model).generate without custom_generate for another one"),
    "no cache": (lambda w: w.generate(use_cache=False), ValueError, "use_cache: got False, expected None or True: FIRP decodes over a static cache of its own"),
    "cache implementation": (lambda w: w.generate(cache_implementation="offloaded"), ValueError, "cache_implementation: got 'offloaded', expected None or 'dynamic' or 'static': FIRP decodes over a static cache of its own"),
    "cache length": (lambda w: w.generate(max_cache_len=9), ValueError, "max_cache_len: got 9, expected None: FIRP decodes over a static cache of its own"),
    "token healing": (lambda w: w.generate(token_healing=True), ValueError, "token_healing: got True, expected None or False: heal the prompt before generating"),
    "attentions": (lambda w: w.generate(output_attentions=True), ValueError, "output_attentions: got True, expected None or False: attention weights are never materialised; use model(...) on the result"),
    "hidden states": (lambda w: w.generate(output_hidden_states=True), ValueError, "output_hidden_states: got True, expected None or False: hidden states are not kept; use model(..., output_hidden_states=True)"),
    "acceptance by name": (lambda w: w.generate(do_sample=True, acceptance="typical"), ValueError, "acceptance: got 'typical', expected firp.TypicalAcceptance(epsilon, delta) or None"),
    "acceptance while greedy": (lambda w: w.generate(acceptance=firp.TypicalAcceptance()), ValueError, "acceptance: got TypicalAcceptance with do_sample=False, expected do_sample=True: greedy decoding is exact"),
    "acceptance without drafts": (lambda w: w.generate(predictor=None, do_sample=True, acceptance=firp.TypicalAcceptance()), ValueError, "acceptance: got TypicalAcceptance without a predictor, expected one: there are no drafts to accept"),
    "acceptance with state": (lambda w: w.generate(do_sample=True, acceptance=firp.TypicalAcceptance(), logits_processor=[Stateful()]), ValueError, "acceptance: got TypicalAcceptance with Stateful, expected processors without state: others see emitted tokens only, not drafts"),
    "frequency": (lambda w: firp.FrequencyPenalty(float("nan")), ValueError, "frequency: got nan, expected a finite number"),
    "presence": (lambda w: firp.FrequencyPenalty(presence="much"), ValueError, "presence: got 'much', expected a finite number"),
    "epsilon": (lambda w: firp.TypicalAcceptance(epsilon=0.0), ValueError, "epsilon: got 0.0, expected above 0 and at most 1"),
    "epsilon above one": (lambda w: firp.TypicalAcceptance(epsilon=1.5), ValueError, "epsilon: got 1.5, expected above 0 and at most 1"),
    "delta": (lambda w: firp.TypicalAcceptance(delta=-1.0), ValueError, "delta: got -1.0, expected above 0"),
    "tree as a tuple": (lambda w: w.generate(tree=(8, 3)), ValueError, "tree: got (8, 3), expected a firp.TreeConfig"),
    "tree without a predictor": (lambda w: w.generate(predictor=None, tree=firp.TreeConfig(4, 1)), ValueError, "tree: given without a predictor, expected None: there is nothing to draft with"),
    "no nodes": (lambda w: firp.TreeConfig(0, 1), ValueError, "num_nodes: got 0, expected 1..256"),
    "too many nodes": (lambda w: firp.TreeConfig(257, 1), ValueError, "num_nodes: got 257, expected 1..256"),
    "no lookahead": (lambda w: firp.TreeConfig(4, 0), ValueError, "num_lookahead: got 0, expected 1..4 (num_nodes)"),
    "lookahead past nodes": (lambda w: firp.TreeConfig(4, 5), ValueError, "num_lookahead: got 5, expected 1..4 (num_nodes)"),
    "tree kind": (lambda w: firp.TreeConfig(4, 1, "bush"), ValueError, "tree_kind: got 'bush', expected one of dynamic, static"),
    "paths of a dynamic tree": (lambda w: paths((0,), kind="dynamic"), ValueError, "paths: given for a 'dynamic' tree, expected kind 'static'"),
    "paths of another number": (lambda w: paths((0,), (1,), nodes=5), ValueError, "paths: got 2 distinct paths, expected num_nodes - 1 = 4"),
    "path without prefix": (lambda w: paths((0,), (1, 0)), ValueError, "paths: (1, 0) is empty, has a negative rank, or lacks its prefix"),
    "negative rank": (lambda w: paths((-1,)), ValueError, "paths: (-1,) is empty, has a negative rank, or lacks its prefix"),
    "empty path": (lambda w: paths(()), ValueError, "paths: () is empty, has a negative rank, or lacks its prefix"),
    "path too deep": (lambda w: w.engine(tree=paths((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))).drafter(1), ValueError, "paths: deepest path has 4 levels, expected at most k = 3"),
    "no offsets": (lambda w: trained(num_offsets=0), ValueError, "num_offsets: got 0, expected 1..255"),
    "insertion layer zero": (lambda w: trained(insertion_layer=0), ValueError, "insertion_layer: got 0, expected 1..3 (4 layers)"),
    "insertion layer at the top": (lambda w: trained(insertion_layer=4), ValueError, "insertion_layer: got 4, expected 1..3 (4 layers)"),
    "predictor as a folder": (lambda w: w.generate(predictor="predictor/"), ValueError, "predictor: got str, expected a FirpPredictor (firp.load_predictor reads one)"),
    "predictor of another vocabulary": (lambda w: firp.Engine(w.other, w.predictor), firp.PredictorMismatch, "predictor: vocab_size differs: the predictor was trained for 7 (unnamed base model), the model has 9"),
    "predictor of another architecture": (lambda w: firp.Engine(tiny_model(1, "qwen2"), w.predictor), firp.PredictorMismatch, "predictor: architecture differs: the predictor was trained for 'LlamaForCausalLM' (unnamed base model), the model has 'Qwen2ForCausalLM'"),
    "predictor of another depth": (lambda w: firp.Engine(tiny_model(1, num_hidden_layers=3), w.predictor), firp.PredictorMismatch, "predictor: num_layers differs: the predictor was trained for 4 (unnamed base model), the model has 3"),
    "predictor of another width": (lambda w: firp.Engine(tiny_model(1, hidden_size=16), w.predictor), firp.PredictorMismatch, "predictor: hidden_size differs: the predictor was trained for 32 (unnamed base model), the model has 16"),
    "predictor folder missing": (lambda w: load_predictor("/no/such/folder"), FileNotFoundError, "predictor: got '/no/such/folder', expected an existing folder or a hub id"),
    "predictor folder half empty": (lambda w: load_predictor(w.folder / 'half'), FileNotFoundError, "predictor: FOLDER/half has no model.safetensors that can be read"),
    "no predictor ships": (lambda w: default_predictor("llama-9"), ValueError, "predictor: got none for the model 'llama-9', expected the folder of one (one ships for smollm2-135m); train one with `firp train`"),
    "dtype": (lambda w: parse_dtype("float12"), ValueError, "dtype: got 'float12', expected one of float32, bfloat16, float16, float64"),
    "model folder": (lambda w: firp.load_model("/no/such/folder"), FileNotFoundError, "model: got '/no/such/folder', expected an existing folder, a hub id or smollm2-135m"),
    "prompts file": (lambda w: load_prompts("/no/such/file.jsonl"), FileNotFoundError, "prompts: got '/no/such/file.jsonl', expected an existing file"),
    "prompts limit": (lambda w: load_prompts(w.folder / 'lines.jsonl', 0), ValueError, "limit: got 0, expected at least 1"),
    "prompts line": (lambda w: load_prompts(w.folder / 'lines.jsonl'), ValueError, "prompts: FOLDER/lines.jsonl, line 2: expected one or more non-empty strings in 'prompt' or 'turns'"),
    "prompts of nothing": (lambda w: load_prompts(w.folder / 'empty.jsonl'), ValueError, "prompts: 'FOLDER/empty.jsonl' holds no prompts"),
    "prompts of no text": (lambda w: load_prompts(w.folder / 'latin.jsonl'), ValueError, "prompts: FOLDER/latin.jsonl, line 1: not UTF-8 text: invalid start byte at byte 1"),
    "implementation of ops": (lambda w: w.engine(impl="magic"), ValueError, "impl: got 'magic', expected one of reference, triton, extension"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("bad"))


def test_there_are_sixty():
    assert len(CASES) >= 60


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_one_exact_error(world, name):
    call, kind, message = CASES[name]
    with pytest.raises(kind) as caught:
        call(world)
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("FOLDER", str(world.folder))

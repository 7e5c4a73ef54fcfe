"""Short runs of tiny engines whose steps are captured, and of eager ones."""

import firp
import torch
from firp.drafting.choices import Choice, Rung
from firp.engine.chooser import Greedy
from firp.engine.graphs import GraphRunner
from firp.generation.loop import run
from firp.generation.output import Output
from models import tiny_model, tiny_predictor
from transformers import StoppingCriteriaList

SHORT, LONG = [torch.tensor([4, 5, 6])], [torch.tensor([5, 4] * 20), torch.tensor([6, 4, 5])]


def decoded(engine, prompts, new_tokens, late, keep_logits=False):
    return with_stats(engine, prompts, new_tokens, late, keep_logits)[0]


def with_stats(engine, prompts, new_tokens, late, keep_logits=False, choose=None):
    out = Output(
        torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True), prompts, new_tokens, [3], StoppingCriteriaList(),
        keep_logits=keep_logits,
    )  # fmt: skip
    return out, run(engine, engine.start(prompts, new_tokens, [3]), choose or Greedy(engine.ops), out, late)


def emitted(engine, prompts, new_tokens=10, late=True):
    return decoded(engine, prompts, new_tokens, late).emitted


def parts(plain=False):
    model = tiny_model(7, vocab=12, dtype=torch.float32)
    return (model,) if plain else (model, tiny_predictor(model, 7), firp.TreeConfig(8, 3))


def expected(*runs, plain=False):
    """What eager steps on a CPU emit."""
    engine = firp.Engine(*parts(plain))
    return [emitted(engine, *arguments, late=False) for arguments in runs]


def looks_up(engine, *trees, num_offsets=3):
    """The engine, as if these trees had been timed on its machine, so that it changes between them and looks up."""
    rungs = Rung(firp.TreeConfig(1, 1), 1.0, 1.0), *(Rung(tree, 1.1 + i / 10, 2.0 + i) for i, tree in enumerate(trees))
    engine._trees.automatic = object()
    engine._trees.choice = Choice(num_offsets, None, dict.fromkeys((1, 2, 4, 8), rungs), "first use")
    return engine


def captured(*arguments):
    engine = firp.Engine(*arguments, compile=False)
    assert isinstance(engine.runner, GraphRunner)
    return engine

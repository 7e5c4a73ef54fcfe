"""What a branch of earlier text is worth to tau, replayed for trees of any size from one recording.

python -m benchmarks.ablations.branches --prompts prompts.jsonl

The model answers the prompts once, greedily. Then every tree is replayed on what the predictor would have drafted at
each position, and on what `firp::lookup_branch` would have found there. Three ways of taking the branch:

- beside: up to 8 nodes follow those of the tree, and have no pseudo rows. So it is on a CPU, where the engine asks for
  as many as pay; here every match gets all 8.
- within: the tree keeps its size, and the branch takes the place of its last nodes and their pseudo rows. So it is on a
  GPU.
- at most so many rows: a smaller tree is drafted where the text has a match, so that no step has more rows.

Two occurrences give two branches: the second follows the best match after which another token came. The engine follows
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import firp
import numpy as np
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.decoder.view import DecoderView
from firp.drafting.lookup import LEAST_MATCH, MOST_BRANCH, MOST_MATCH, Text, making_way
from firp.drafting.profile import ABSENT, AcceptanceProfile
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.drafting.trees import TreeConfig
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.prompt_files import OWN_PROMPTS, load_prompts
from torch import Tensor

from benchmarks.ablations.answers import answers_to, tau_by_category
from benchmarks.commands import run
from benchmarks.document import Document, digest

OUT = Path(__file__).parents[1] / "results/branches.json"
FIELDS = "positions", "matched", "trees"


class Trees(NamedTuple):
    """What is drafted: a tree, and another one with a branch of at most so many nodes where the text has a match.

    Attributes:
        branch: nodes of each branch.
        within: the branch has the pseudo rows of the nodes whose place it takes.
        occurrences: earlier occurrences that are followed, 1 or 2.
    """

    tree: tuple[int, int]
    matched: tuple[int, int]
    branch: int
    num_offsets: int
    within: bool = False
    occurrences: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of a step without a match, and with one."""
        (nodes, lookahead), (fewer, looking) = self.tree, self.tree if self.within else self.matched
        k, branch = self.num_offsets, 0 if self.within else self.branch * self.occurrences
        return nodes + lookahead * k, fewer + looking * k + branch


def beside(nodes: int, lookahead: int, k: int, occurrences: int = 1) -> Trees:
    return Trees((nodes, lookahead), (nodes, lookahead), MOST_BRANCH, k, occurrences=occurrences)


def within(nodes: int, k: int) -> Trees:
    fewer = nodes - making_way(nodes)
    return Trees((nodes, nodes), (fewer, fewer), making_way(nodes), k, True)


BESIDE = [beside(*size) for size in ((2, 2, 1), (4, 2, 2), (4, 3, 2), (8, 8, 3), (64, 64, 3))]
# What remains of 64 nodes is a size that profiles know.
WITHIN = [*(within(nodes, 3) for nodes in (8, 16, 32)), Trees((64, 64), (48, 48), MOST_BRANCH, 3, True)]
TWO = [
    *(beside(*size, occurrences=2) for size in ((2, 2, 1), (4, 3, 2), (8, 8, 3), (64, 64, 3))),
    Trees((64, 64), (48, 48), MOST_BRANCH, 3, True, 2),
]
FEW_ROWS = [
    Trees((4, 3), (2, 1), 6, 2),
    Trees((4, 3), (3, 2), 3, 2),
    Trees((2, 2), (2, 1), 2, 1),
    Trees((2, 2), (2, 2), 6, 1),
    Trees((3, 2), (3, 2), 3, 2),
]


def right(text: Text, end: int, wanted: list[int]) -> int:
    """How many tokens of the branch after an earlier end are the answer's own."""
    follows, count = text.tokens[end + 1 :], 0
    while count < len(wanted) and follows[count % len(follows)] == wanted[count]:
        count += 1
    return count


def second_end(text: Text) -> int | None:
    """Where the best match ends after which another token came than the expected one, in all of the text: the longest,
    then the latest.
    """
    tokens, last, best = text.tokens, len(text.tokens) - 1, (LEAST_MATCH - 1, -1)
    for end in range(1, last):
        if tokens[end] != tokens[last] or tokens[end + 1] == text.expected:
            continue
        length = 1
        while length < MOST_MATCH and length <= end and tokens[end - length] == tokens[last - length]:
            length += 1
        best = max(best, (length, end))
    return best[1] if best[0] >= LEAST_MATCH else None


def found(answers: list[tuple[Tensor, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """At each position of the answers: whether the text up to there has a match, [P], and how many tokens of a branch
    are the answer's own with one occurrence and with two, [P, 2].
    """
    matches, held = [], []
    for prompt, answer in answers:
        text = Text(prompt.tolist())
        for place, token in enumerate(answer):
            wanted = answer[place : place + MOST_BRANCH]
            first = right(text, text.match.end, wanted) if text.match else 0
            other = second_end(text) if text.match else None
            matches.append(text.match is not None)
            held.append((first, first if other is None else max(first, right(text, other, wanted))))
            text.append(token)
    return np.array(matches), np.array(held)


def replay(profile: AcceptanceProfile, trees: Trees, matches: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Steps that each answer takes, [S]. A branch makes nodes give way here also where the tree holds it already."""
    k, starts = trees.num_offsets, np.cumsum(profile.lengths) - profile.lengths
    kinds = {False: (trees.tree, 0), True: (trees.matched, trees.branch)}
    reached = {kind: profile.reached(TreeConfig(*size), k) for kind, (size, _) in kinds.items()}
    steps = np.zeros(len(profile.lengths), np.int64)
    for sequence, length in enumerate(profile.lengths):
        # The first tree is the root alone, as if nothing had been left of a range of offsets.
        root, source, up = 0, 0, k
        while root < length:
            at = starts[sequence] + root
            match = bool(matches[at])
            (_, lookahead), branch = kinds[match]
            places = reached[match][starts[sequence] + source, up]
            own = int((places[1:] != ABSENT).cumprod().sum())
            accepted = max(own, min(branch, int(held[at, trees.occurrences - 1])))
            nearest = accepted
            if accepted <= own or not trees.within:
                nearest = max(depth for depth in range(min(own, accepted) + 1) if places[depth] < lookahead)
            source, up = root + nearest, min(accepted - nearest, k)
            root += accepted + 1
            steps[sequence] += 1
    return steps


def figures(profile: AcceptanceProfile, answers: list[tuple[Tensor, list[int]]]) -> dict:
    """tau of each of the trees, without a branch and with one, over all answers and by category."""
    matches, held = found(answers)
    none = np.zeros_like(matches)

    def tau(trees: Trees, matches: np.ndarray) -> dict[str, float]:
        return tau_by_category(profile, replay(profile, trees, matches, held))

    made = {}
    for name, group in (("beside", BESIDE), ("within", WITHIN), ("two", TWO), ("few rows", FEW_ROWS)):
        made[name] = [
            {**trees._asdict(), "rows": trees.rows, "tau": tau(trees, matches), "without": tau(trees, none)}
            for trees in group
        ]
    return {"positions": int(profile.lengths.sum()), "matched": float(matches.mean()), "trees": made}


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of held-out prompts; default: the project's.")] = OWN_PROMPTS,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    predictor: Annotated[str | None, typer.Option(help="Default: the one shipped for the model.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
) -> None:
    """Replay trees with and without branches of earlier text; each file of prompts is a part of the document."""
    drafts = firp.default_predictor(model) if predictor is None else firp.load_predictor(predictor)
    most = max(trees.num_offsets for trees in (*BESIDE, *WITHIN, *TWO, *FEW_ROWS))
    if drafts.num_offsets < most:
        raise ValueError(f"predictor: got num_offsets {drafts.num_offsets}, expected at least {most}")
    chosen = load_prompts(prompts, limit)
    base, tokenizer = firp.load_model(model, dtype, "cpu")
    settings = {
        "model": model, "dtype": dtype, "limit": limit, "max_new_tokens": max_new_tokens, "tau": TAU_FORMULA,
        "threads": torch.get_num_threads(),
    }  # fmt: skip

    def compute() -> dict:
        answers = answers_to(base, tokenizer, chosen, max_new_tokens)
        view = DecoderView(base)
        profile = make_profile(view, drafts, answers, token_tables(view, drafts.transition))
        return figures(profile, [(text, answer) for text, answer, _ in answers])

    made_from = {"firp": drafts.fingerprint(), "prompts": digest(prompts.read_bytes())}
    made = Document(json_path, settings, environment(base), FIELDS).part(prompts.name, made_from, compute)
    for name, group in made["trees"].items():
        for trees in group:
            nodes, lookahead = trees["tree"]
            size = f"{nodes} nodes, {lookahead} lookahead nodes, k = {trees['num_offsets']}"
            print(f"{name}: {size}: tau {cut(trees['without']['all'], 3)}, with branches {cut(trees['tau']['all'], 3)}")


if __name__ == "__main__":
    run(main)

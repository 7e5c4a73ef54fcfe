"""`firp distill --server`: OpenAI-compatible servers that run the base model answer the prompts."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from firp.tools.files import explained
from firp.tools.models import load_tokenizer
from firp.tools.prompt_files import encode, load_prompts
from firp.train.answer_file import AnswerFile, Item
from firp.train.distill import DistillConfig
from firp.train.run_files import append_line
from firp.train.server import Refused, Server, ServerAnswer, Unavailable
from firp.train.server_pool import Outcome, ServerPool
from firp.train.text_parts import join_parts, opened_parts, remove_parts

ANSWERS = "answers.jsonl"
# So many prompts without an answer, one after another, end a run: the servers are gone, or take nothing.
FAILURES_IN_A_ROW = 32


@dataclass(frozen=True)
class ServerConfig:
    """Which servers answer, and how they are asked; none of it is kept with the text.

    Attributes:
        urls: of their APIs, such as http://localhost:8000/v1.
        concurrency: requests in flight at most, over all servers.
        served_model: the model's name there; None for the only one that the first server lists.
        timeout_s: seconds for one answer.
    """

    urls: tuple[str, ...]
    concurrency: int = 32
    served_model: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("server: got none, expected at least one URL")
        if self.concurrency < 1:
            raise ValueError(f"concurrency: got {self.concurrency}, expected at least 1")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout: got {self.timeout_s}, expected more than 0 seconds")


@dataclass(frozen=True)
class ServerReport:
    """What a run ended with.

    Attributes:
        answers: prompts with an answer in the output.
        failures: prompts without one, listed in `failures_file`.
        tokens: of the answers of this run, in `seconds`.
        exact: answers whose token ids the server told.
        recounted: other answers that have another number of tokens here than the server counted.
    """

    answers: int
    failures: int
    failures_file: Path
    tokens: int
    seconds: float
    exact: int
    recounted: int


def distill_from_servers(
    config: DistillConfig,
    servers: ServerConfig,
    output: str | Path,
    progress: bool = True,
    wait: Callable[[float], object] | None = None,
) -> ServerReport:
    """Have servers answer the prompts and write what `firp train` reads; go on where an earlier run was cut off.

    Every answer is kept in `OUTPUT.parts/` as it comes, once. Prompts that got none are listed in
    a file of failures; the parts then stay, and the next run asks for these alone. Every second prompt is answered
    greedily, the others with a seed of their own. `batch_size` and `dtype` of the config are the server's business.

    Args:
        wait: sleeps between attempts; tests give one that does not.

    Returns:
        what came of it; the output has arrays as in `firp.train.data.TextDataset` plus `greedy`, `exact` and `ids` [n].

    Raises:
        ValueError, FileNotFoundError: unreadable prompts, a bad setting, damaged parts, a server that runs another
            model, or takes no request.
        OSError: the disk refuses a file, the servers answer no more; answers so far stay.
    """
    output = Path(output)
    prompts = load_prompts(config.prompts, config.limit)
    pool = ServerPool([Server(url, servers.timeout_s) for url in servers.urls], wait)
    served_model = servers.served_model or _served_model(pool.servers[0], config.model)
    settings = {name: value for name, value in asdict(config).items() if name not in ("batch_size", "dtype")}
    with opened_parts(output, settings | {"served_model": served_model}) as parts:
        tokenizer = load_tokenizer(config.model)
        if not tokenizer.chat_template:
            raise ValueError(f"model: {config.model} has no chat template, expected one: servers are sent messages")
        encoded = [encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
        items = [
            Item(i, prompt.id, prompt.turns[0], tokens)
            for i, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True))
            if len(tokens) <= config.max_prompt_tokens
        ]
        if not items:
            raise ValueError(f"max_prompt_tokens: no prompt has at most {config.max_prompt_tokens} tokens")
        kept = AnswerFile(parts / ANSWERS, items, len(tokenizer))
        failures = output.with_name(f"{output.stem}.failures.jsonl")
        run = _Run(config, served_model, tokenizer, kept, failures)
        run.ask(pool, servers.concurrency, progress)
        if not kept.answers:
            raise ValueError(f"server: no prompt was answered; {failures} says why")
        join_parts([kept.arrays()], output)
        if not run.failed:
            remove_parts(parts)
    return run.report()


def _served_model(server: Server, model: str) -> str:
    """The only model a server lists, or the one of the same name as the base model."""
    try:
        names = server.models()
    except (Unavailable, Refused) as error:
        raise ConnectionError(f"server: {error}; expected an API that lists its models, or served_model") from error
    if model in names:
        return model
    if len(names) != 1:
        raise ValueError(
            f"served_model: got none, and {server.url} lists {', '.join(names[:20]) or 'no model'}; expected its name "
            "there"
        )
    return names[0]


class _Run:
    """The asking: requests, what is kept of the answers, and the list of failures."""

    def __init__(
        self,
        config: DistillConfig,
        served_model: str,
        tokenizer: PreTrainedTokenizerBase,
        kept: AnswerFile,
        failures: Path,
    ) -> None:
        self.config, self.served_model, self.tokenizer, self.kept = config, served_model, tokenizer, kept
        self.failures_file = failures
        self.failed = self.tokens = 0
        self.seconds = 0.0

    def ask(self, pool: ServerPool, concurrency: int, progress: bool) -> None:
        """Ask for every answer that is missing, and keep each as it comes."""
        started = time.monotonic()
        with explained(self.failures_file):
            self.failures_file.unlink(missing_ok=True)
        requests = ((item, self._request(item)) for item in self.kept.missing())
        last: deque[bool] = deque(maxlen=FAILURES_IN_A_ROW)
        total, there = len(self.kept.items), len(self.kept.answers)
        disabled = None if progress else True
        with (
            tqdm(total=total, initial=there, desc="distill", unit="prompt", disable=disabled) as bar,
            closing(pool.ask_all(requests, concurrency)) as outcomes,
        ):
            for outcome in outcomes:
                last.append(self._keep(outcome))
                self.seconds = time.monotonic() - started
                bar.update()
                bar.set_postfix_str(f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s, {self.failed} failed")
                if len(last) == FAILURES_IN_A_ROW and not any(last):
                    raise ConnectionError(
                        f"server: the last {FAILURES_IN_A_ROW} prompts got no answer, the last one: {outcome.error}; "
                        "answers so far are kept, run the same command to go on"
                    )

    def _request(self, item: Item) -> dict:
        return {
            "model": self.served_model,
            "messages": [{"role": "user", "content": item.text}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": 0.0 if item.greedy else self.config.temperature,
            "top_p": 1.0,
            "seed": (self.config.seed * 1_000_003 + item.index) % 2**31,
        }

    def _keep(self, outcome: Outcome[Item]) -> bool:
        """Write an answer or a failure to its file; True for an answer."""
        item, error = outcome.key, outcome.error
        if outcome.answer is not None:
            try:
                tokens, exact, recounted = self._tokens(item, outcome.answer)
                self.kept.add(item, tokens, exact, recounted)
            except ValueError as wrong:
                error = str(wrong)
            else:
                self.tokens += len(tokens)
                return True
        failure = {"index": item.index, "id": item.id, "attempts": outcome.attempts, "error": error}
        append_line(self.failures_file, json.dumps(failure))
        self.failed += 1
        return False

    def _tokens(self, item: Item, answer: ServerAnswer) -> tuple[list[int], bool, bool]:
        """Token ids of an answer, whether the server told them, and whether it counted others.

        Raises:
            ValueError: an answer to another prompt.
        """
        told = answer.prompt_tokens if answer.prompt_ids is None else answer.prompt_ids
        here = len(item.tokens) if answer.prompt_ids is None else item.tokens
        if told is not None and told != here:
            told, here = (x if isinstance(x, int) else len(x) for x in (told, here))
            raise ValueError(
                f"the server's prompt has other tokens ({told}) than the chat template of {self.config.model} gives "
                f"({here}): another template or tokenizer"
            )
        if answer.token_ids is not None:
            return answer.token_ids, True, False
        tokens = self.tokenizer(answer.text, add_special_tokens=False).input_ids
        ended = answer.complete and self.tokenizer.eos_token_id is not None
        if ended:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        # Servers count the end token, or do not.
        counted = answer.completion_tokens
        return tokens, False, counted is not None and counted not in (len(tokens), len(tokens) - ended)

    def report(self) -> ServerReport:
        """What this run, and those before it, ended with."""
        answers = self.kept.answers.values()
        exact, recounted = (sum(record[name] for record in answers) for name in ("exact", "recounted"))
        return ServerReport(len(answers), self.failed, self.failures_file, self.tokens, self.seconds, exact, recounted)

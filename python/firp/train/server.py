"""One request to an OpenAI-compatible server, and what its answer or its error means.

Python's own HTTP client is enough for whole answers of a few threads. It follows no redirect here: a key must not reach
another host.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from firp.tools.files import parse_object

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER_BYTES = 1 << 26
TRANSIENT = (408, 409, 425, 429)
# Of vLLM and SGLang: the answer's own token ids, and no cut of the distribution that the model's files ask for.
EXTENSIONS = {"return_token_ids": True, "top_k": -1}


class Unavailable(OSError):
    """Another attempt may end well; after `after` seconds, if the server said so."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Refused(ValueError):
    """The server takes this request at no time."""


class WrongServer(ValueError):
    """The server takes no request of this run."""


@dataclass(frozen=True)
class ServerAnswer:
    """What a server said.

    Attributes:
        text: of the answer, special tokens left out.
        complete: whether the model ended it; False where it was cut at the limit.
        token_ids: of the answer, and `prompt_ids` of the prompt, where the server tells them.
        prompt_tokens, completion_tokens: the server's counts, where it tells them.
    """

    text: str
    complete: bool
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


class Server:
    """An OpenAI-compatible API at `url`, such as http://localhost:8000/v1; used by many threads.

    The key is that of the environment variable OPENAI_API_KEY, if there is one. No error tells it.

    Args:
        url: of the API; without credentials or a query.
        timeout_s: seconds for one answer.

    Raises:
        ValueError: another kind of URL.
    """

    def __init__(self, url: str, timeout_s: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            parts.port  # noqa: B018 (raises for one that is no number)
        except ValueError as error:
            raise ValueError(f"server: got a URL that cannot be read: {error}") from error
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"server: got a URL of {parts.hostname} with credentials or a query, expected none: the key is read "
                f"from {KEY_VARIABLE}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server: got {url!r}, expected a URL such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        self.timeout_s, self.clock = timeout_s, clock
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"{KEY_VARIABLE}: got characters that no HTTP header holds, expected printable ASCII")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.extensions = dict(EXTENSIONS)

    def models(self) -> list[str]:
        """Names of the models served.

        Raises:
            Unavailable, Refused, WrongServer: no list.
        """
        document = self._call("models")
        try:
            return [self._hidden(str(model["id"])) for model in document["data"]]
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{self.url}/models: got no list of models") from error

    def complete(self, request: dict) -> ServerAnswer:
        """The answer to a chat completion.

        Raises:
            Unavailable, Refused, WrongServer: no answer.
        """
        extensions = self.extensions
        try:
            document = self._call("chat/completions", request | extensions)
        except Refused:
            if not extensions:
                raise
            document = self._call("chat/completions", request)
            self.extensions = {}  # it knows OpenAI's fields alone
        return self._read(document)

    def _call(self, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json", "User-Agent": "firp"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        ends = self.clock() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                text = self._receive(response, ends)
        except urllib.error.HTTPError as error:
            raise self._meaning(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unavailable(self._hidden(f"{self.url}: {reason or type(error).__name__}")) from None
        try:
            return parse_object(text)
        except ValueError as error:
            raise Unavailable(self._hidden(f"{self.url}: malformed answer: {error}")) from None

    def _receive(self, response: http.client.HTTPResponse, ends: float) -> bytes:
        text = b""
        while chunk := response.read1(1 << 16):
            text += chunk
            if len(text) > MAX_ANSWER_BYTES:
                raise Unavailable(f"{self.url}: got more than {MAX_ANSWER_BYTES} bytes")
            if self.clock() > ends:
                raise Unavailable(f"{self.url}: no whole answer in {self.timeout_s:g} s")
        return text

    def _meaning(self, error: urllib.error.HTTPError) -> Exception:
        """The exception that an HTTP status stands for."""
        with error:
            try:
                said = " ".join(error.read(2000).decode(errors="replace").split())
            except (OSError, http.client.HTTPException):
                said = ""
        message = self._hidden(f"{self.url}: HTTP {error.code} {error.reason}: {said}")[:500]
        if error.code in TRANSIENT or error.code >= 500:
            return Unavailable(message, _seconds(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            return WrongServer(f"server: {message}; the key is read from {KEY_VARIABLE}")
        if error.code < 400 or error.code in (404, 405):
            return WrongServer(f"server: {message}; expected the URL of an OpenAI-compatible API and a model it serves")
        return Refused(message)

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _read(self, document: dict) -> ServerAnswer:
        try:
            choice = document["choices"][0]
            message, usage = choice["message"], document.get("usage") or {}
            text, finish = message.get("content") or "", choice.get("finish_reason")
            ids, prompt_ids = (
                choice.get(name, document.get(name)) for name in ("token_ids", "prompt_token_ids")
            )  # vLLM has the prompt's beside the choices
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
            aside = message.get("reasoning_content") or message.get("reasoning") or message.get("tool_calls")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unavailable(f"{self.url}: malformed answer: {type(error).__name__} {error}") from None
        for name, found in (("token_ids", ids), ("prompt_token_ids", prompt_ids)):
            if found is not None and not (isinstance(found, list) and all(type(token) is int for token in found)):
                raise Unavailable(f"{self.url}: malformed answer: {name}: expected a list of integers")
        if not isinstance(text, str) or not all(count is None or type(count) is int for count in counts):
            raise Unavailable(f"{self.url}: malformed answer: expected content as text, and usage as integers")
        if aside and ids is None:
            raise WrongServer(
                f"server: {self.url} takes reasoning or tool calls out of the text; start it without such a parser, or "
                "one that knows return_token_ids"
            )
        if finish not in ("stop", "length", "tool_calls"):
            got = self._hidden(str(finish))[:80]
            raise Unavailable(f"{self.url}: finish_reason: got {got!r}, expected 'stop' or 'length'")
        return ServerAnswer(text, finish != "length", ids, prompt_ids, *counts)


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

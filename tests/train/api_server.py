"""A server of the OpenAI API that does what a test scripts, and a tiny model with a chat template."""

import json
import socket
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoTokenizer

from benchmarks.gpu import tiny_model

TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for m in messages %}{{ {'user': 'w20', 'assistant': 'w21', 'system': 'w22'}[m.role] }} {{ m.content }} [EOS] "
    "{% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
)


def write_chat_model(root):
    """Write a tiny model whose tokens are words, w0 to w27, with a chat template, to root/model."""
    tiny_model.write(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def completion(text, finish="stop", usage=None, **choice):
    """A chat completion as the API gives it."""
    message = {"role": "assistant", "content": text}
    document = {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish, **choice}]}
    return document | ({"usage": usage} if usage else {})


class Api:
    """Answers to prompts: `script` lists, by prompt, what the first attempts meet; `reply` makes whole answers.

    A step of a script is a status, (status, headers), bytes sent as the body of a 200, a function of the handler, or a
    document.
    """

    def __init__(self):
        self.script, self.requests = defaultdict(list), []
        self.attempts, self.answered = Counter(), Counter()
        self.in_flight = self.most_in_flight = 0
        self.headers, self.names, self.strict = [], ["tiny"], False
        self.lock = threading.Lock()
        self.reply = lambda body: completion(body["messages"][-1]["content"])

    def __enter__(self):
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def send(self, status, body, headers=()):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.send(200, json.dumps({"data": [{"id": name} for name in api.names]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.headers.append(dict(self.headers))
                if api.strict and "return_token_ids" in body:
                    self.send(422, b'{"detail": "Unexpected fields"}')
                    return
                prompt = body["messages"][-1]["content"]
                with api.lock:
                    api.requests.append(body)
                    attempt = api.attempts[prompt]
                    api.attempts[prompt] += 1
                    api.in_flight += 1
                    api.most_in_flight = max(api.most_in_flight, api.in_flight)
                steps = api.script[prompt]
                step = steps[min(attempt, len(steps) - 1)] if steps else None
                try:
                    self.act(step, body, prompt)
                finally:
                    with api.lock:
                        api.in_flight -= 1

            def act(self, step, body, prompt):
                if callable(step):
                    step = step(self)
                    if step == "gone":
                        return
                if isinstance(step, bytes):
                    self.send(200, step)
                elif isinstance(step, int):
                    self.send(step, b'{"error": "scripted"}')
                elif isinstance(step, tuple):
                    self.send(step[0], b"scripted", step[1])
                else:
                    document = step or api.reply(body)
                    with api.lock:
                        api.answered[prompt] += 1
                    self.send(200, json.dumps(document).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def dropped(handler):
    """Close the connection without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    return "gone"


def cut_off(handler):
    """Promise a long answer and break off."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"message": {"content": "w1')
    handler.wfile.flush()
    return dropped(handler)

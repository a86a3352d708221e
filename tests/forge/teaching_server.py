"""A completions server for tests that speaks of token ids as vLLM does, in a thread; what it says is computed by a real teacher.

Shapes after vLLM's `CompletionResponse`: `prompt_logprobs` is a list by position, the first null, of {id: {"logprob", "rank",
"decoded_token"}} with the k likeliest and the token that stands there; with `return_tokens_as_token_ids`, tokens are "token_id:17".
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from coordinator.forge.teachers.gguf import GgufTeacher
from protocol.models.tokenizer import Example, Tokenizer


class TeachingServer:
    """`plan` holds what to answer before anything else: (status, headers, body) each; `seen` every path and body asked for."""

    def __init__(self, model: Path) -> None:
        self.teacher = GgufTeacher(model)
        self.tokenizer = Tokenizer(model)
        self.plan: list[tuple[int, dict[str, str], bytes]] = []
        self.seen: list[tuple[str, Any]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: Any) -> None:
                with outer._lock:
                    outer.seen.append((self.path, body))
                    status, headers, data = (
                        outer.plan.pop(0) if outer.plan else (200, {}, json.dumps(outer.answer(self.path, body)).encode())
                    )
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        self.teacher.close()
        self.tokenizer.close()

    def answer(self, path: str, body: Any) -> dict[str, Any]:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "tiny", "owned_by": "vllm", "created": 1, "root": "tiny", "max_model_len": 512}]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], bos=False)}
        if path != "/v1/completions":
            return {"error": "no such path"}
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer.encode(body["prompt"], bos=True)
        choice: dict[str, Any] = {"index": 0, **self._continued(prompt, body)}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self._scored(prompt, body["prompt_logprobs"])
        return {"object": "text_completion", "model": "tiny", "choices": [choice]}

    def _continued(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        text = self.tokenizer.decode(prompt[1:])
        temperature = float(body["temperature"])
        ((said,),) = self.teacher.generate(
            [text], n=1, temperature=temperature, seed=body.get("seed", 0), max_new_tokens=body["max_tokens"]
        )  # fmt: skip
        each = self.teacher.log_probs([Example(prompt, list(said.tokens or ()))])[0].tolist()
        told = {"tokens": [f"token_id:{token}" for token in said.tokens or ()], "token_logprobs": each, "top_logprobs": None}
        return {"text": said.text, "finish_reason": "stop" if said.finished else "length", "logprobs": told if "logprobs" in body else None}

    def _scored(self, ids: list[int], k: int) -> list[Any]:
        example = Example(ids[:1], ids[1:])
        (top,), (own,) = self.teacher.score([example], k=k), self.teacher.log_probs([example])
        rows = []
        for at, token in enumerate(ids[1:]):
            entries = dict(zip(top.ids[at].tolist(), top.log_probs[at].tolist(), strict=True)) | {token: float(own[at])}
            rows.append({str(name): {"logprob": value, "rank": 1, "decoded_token": ""} for name, value in entries.items()})
        return [None, *rows]

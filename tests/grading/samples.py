"""Samples and a scripted HTTP server for the tests of graders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np

from graft.grading.sandbox import SandboxResult
from graft.types import Outcome, Prompt, Sample, StopReason


def sample(text: str = "text", *, stop: StopReason = StopReason.EOS, row: int = 3, **item: Any) -> Sample:
    """A completion of a row with these keys."""
    prompt = Prompt(row=row, messages=(), item=item, tokens=np.array([1], np.int32), question="")
    return Sample(prompt=prompt, text=text, tokens=5, stop=stop)


def sandbox_result(value: float | None, outcome: Outcome = Outcome.GRADED, reason: str = "") -> SandboxResult:
    """What the sandbox says of one call."""
    return SandboxResult(value, outcome, reason, stdout="", seconds=0.0)


@dataclass
class Reply:
    """What the server does with one request."""

    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""

    headers: Mapping[str, str] = field(default_factory=dict)
    claims: int | None = None
    """Content-Length, where it shall not be the body's."""

    wait: threading.Event | None = None
    """Answers only when it is set."""

    drips: Literal["", "headers", "body"] = ""
    """Sends a little of these now and then, until `wait` is set: no read is ever long."""


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any


class Scripted:
    """A server that answers request after request as it is told; the last answer is repeated."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.answer: Callable[[Request], Reply] | None = None
        self.lock = threading.Lock()

    def next_reply(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            if self.answer is None:
                return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return self.answer(request)


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    """A real HTTP server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {key.lower(): value for key, value in self.headers.items()}
            reply = script.next_reply(Request(self.path, headers, body))
            if reply.drips:
                self.drip(reply)
                return
            if reply.wait is not None:
                reply.wait.wait()
            raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            headers = {"content-type": "application/json", **reply.headers}
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("content-length", str(len(raw) if reply.claims is None else reply.claims))
            self.end_headers()
            try:
                self.wfile.write(raw)
            except OSError:
                self.close_connection = True
            if reply.claims is not None:
                self.close_connection = True

        def drip(self, reply: Reply) -> None:
            assert reply.wait is not None
            self.close_connection = True
            start = b"content-length: 1000000\r\n\r\n" if reply.drips == "body" else b"x-slow: "
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" + start)
                while not reply.wait.wait(0.02):
                    self.wfile.write(b" ")
            except OSError:
                return

        def log_message(self, format: str, *arguments: Any) -> None:
            """Tests read what they want to know from `requests`."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away, as it does when it waited too long."""

    server = Server(("127.0.0.1", 0), Handler)
    script = Scripted(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def judged(
    content: Any,
    *,
    prompt: int = 11,
    completion: int = 7,
    cached: int = 3,
    refusal: str | None = None,
    finish: str = "stop",
    model: str = "judge-1",
) -> Reply:
    """A chat completion; what is not text is sent as JSON text."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    return Reply(
        body={
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish,
                    "message": {"role": "assistant", "content": text, "refusal": refusal},
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }
    )


def verdict(result: Any, *conclusions: str) -> dict[str, Any]:
    """What a judge answers."""
    return {
        "steps": [{"description": "look", "conclusion": text} for text in conclusions],
        "result": result,
    }

"""Asking judge models: any server that speaks OpenAI's chat completions, with structured output.

Failures of the server and of the judge come back as an `Answer` with a fault; they are never scores. Answers of the
form that was asked for are kept on disk under the content of the question, so that the same question is asked once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.data.sources import printable, shown
from graft.grading.deadline import within
from graft.grading.libraries import import_library
from graft.grading.observe import schema_check
from graft.grading.pace import Pace
from graft.types import Fault, Outcome, TokenUsage

NO_KEY = "none"
"""Sent where the server wants no key: the client library insists on one."""

LARGEST = 1e100
"""Of the numbers of an embedding: larger ones are none, and their products would be infinite."""


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """Where a model is reached."""

    base_url: str
    api_key: str
    model: str
    """The server's name for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    value: Mapping[str, Any] | None
    """The JSON object of the judge; None where there is none."""

    model: str
    """The model that answered, as its server calls it."""

    usage: TokenUsage = field(default_factory=TokenUsage)
    """Nothing for what came from the disk."""

    fault: Fault | None = None
    details: str = ""
    outcome: Outcome = Outcome.GRADED


class AnswersOnDisk:
    """Answers by the content of their question: one small JSON file each, written atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """The stored answer; None if there is none that can be read."""
        try:
            stored = json.loads(self._path(question).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    def write(self, question: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Store an answer; a full disk costs the cache, not the grade."""
        path = self._path(question)
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
            ) as file:
                temporary = file.name
                json.dump(answer, file)
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _path(self, question: Mapping[str, Any]) -> Path:
        text = json.dumps(question, sort_keys=True)
        name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self._folder / name[:2] / f"{name}.json"


class JudgeClient:
    """Asks the servers of judge and embedding models. Safe to use from many threads."""

    def __init__(
        self,
        default: JudgeServer | None,
        servers: Mapping[str, JudgeServer],
        *,
        timeout_s: float = 120.0,
        retries: int = 5,
        pace: Pace | None = None,
        cache: AnswersOnDisk | None = None,
    ) -> None:
        """
        Args:
            default: server of the models that are not in `servers`, each under its own name.
            servers: a grader's `model` -> where it is reached.
            timeout_s: longest time of one attempt, its turn not counted.
            retries: further attempts after a failure that may pass: no connection, 408, 409, 429, 5xx, half an answer.
                They wait as long as the server says (Retry-After), else from half a second to eight, doubling.
            pace: spaces attempts, first and further ones.
            cache: where answers are kept.

        Raises:
            GraderError: the openai library is missing.
        """
        self._openai = import_library("openai", "judge models")
        self._failures = (self._openai.OpenAIError, ValueError, OverflowError, RecursionError, OSError)
        self._default, self._servers = default, servers
        self._timeout_s, self._retries = timeout_s, retries
        self._pace = pace or Pace(None)
        self._cache = cache
        self._clients = {
            (server.base_url, server.api_key): self._connect(server)
            for server in [*servers.values(), *([default] if default else [])]
        }

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def ask(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema_name: str,
        schema: Mapping[str, Any],
        sampling: Mapping[str, Any],
    ) -> Answer:
        """Ask a model for a JSON object.

        Args:
            model: as the grader names it.
            messages: in the form of chat completions.
            schema_name: name of the answer's form.
            schema: the answer's form, a JSON schema.
            sampling: further arguments of the request.
        """
        server = self.server_of(model)
        request = {
            "model": server.model,
            "messages": list(messages),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": schema_name, "strict": True, "schema": schema},
            },
            **sampling,
        }
        question = {"base_url": server.base_url, **request}
        stored = None if self._cache is None else self._cache.read(question)
        if stored is not None and _follows(stored.get("value"), schema):
            return Answer(stored["value"], str(stored.get("model")))
        try:
            reply = self._call(server, lambda client: _checked(client.chat.completions.create(**request)))
        except self._failures as error:
            return self._failure(server, error)
        answer = _read(reply, server)
        if self._cache is not None and _follows(answer.value, schema):
            self._cache.write(question, {"value": answer.value, "model": answer.model})
        return answer

    def embed(self, model: str, texts: Sequence[str]) -> tuple[Answer, list[list[float]]]:
        """The vectors of texts; none where the answer says what failed."""
        server = self.server_of(model)
        question = {"base_url": server.base_url, "model": server.model, "embed": list(texts)}
        stored = None if self._cache is None else self._cache.read(question)
        if stored is not None and isinstance(stored.get("vectors"), list):
            return Answer({}, server.model), stored["vectors"]
        try:
            reply = self._call(
                server,
                lambda client: _vectors(
                    client.embeddings.create(model=server.model, input=list(texts), encoding_format="float"),
                    len(texts),
                ),
            )
        except self._failures as error:
            return self._failure(server, error), []
        vectors, tokens = reply
        if self._cache is not None:
            self._cache.write(question, {"vectors": vectors})
        return Answer({}, server.model, TokenUsage(prompt=tokens)), vectors

    def server_of(self, model: str) -> JudgeServer:
        """Where a model is reached; `build.py` has checked that it is known."""
        if model in self._servers:
            return self._servers[model]
        assert self._default is not None
        return JudgeServer(self._default.base_url, self._default.api_key, model)

    def knows(self, model: str) -> bool:
        """Whether the settings name this model."""
        return model in self._servers

    def _connect(self, server: JudgeServer) -> Any:
        return self._openai.OpenAI(
            base_url=server.base_url,
            api_key=server.api_key or NO_KEY,
            max_retries=self._retries,
            timeout=self._timeout_s,
            http_client=_http_client(self._openai, self._pace, self._timeout_s),
        )

    def _call(self, server: JudgeServer, ask: Any) -> Any:
        """The library repeats what the server refused; an answer that breaks off is asked for again here."""
        client = self._clients[server.base_url, server.api_key]
        for _attempt in range(self._retries):
            with suppress(ValueError, RecursionError):  # half an answer, or none
                return ask(client)
        return ask(client)

    def _failure(self, server: JudgeServer, error: Exception) -> Answer:
        late = isinstance(error, self._openai.APITimeoutError)
        return Answer(
            None,
            server.model,
            fault=Fault.MODEL_GRADER_SERVER,
            details=printable(f"{server.model} at {server.base_url}: {_said(error)}")[:1000],
            outcome=Outcome.TIMED_OUT if late else Outcome.CRASHED,
        )


def _http_client(openai: Any, pace: Pace, timeout_s: float) -> Any:
    """The library's own client, in which each attempt waits for its turn and ends in time."""
    httpx = import_library("httpx2", "judge models")

    class PacedClient(openai.DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            pace.wait()
            try:
                return within(timeout_s, lambda: super(PacedClient, self).send(request, **options))
            except TimeoutError:
                raise httpx.ReadTimeout(f"no whole answer in {timeout_s:g} s", request=request) from None

    return PacedClient()


def _said(error: Exception) -> str:
    """An error with what the server said, or with what the connection was lost of."""
    reply, cause = getattr(error, "response", None), error.__cause__
    said = f" {reply.text[:200]}" if reply is not None and reply.text not in str(error) else ""
    return f"{type(error).__name__}: {error}{said}" + (f" ({cause})" if cause is not None else "")


def _follows(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether an answer has the form that was asked for, and finite numbers."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return isinstance(value, dict) and schema_check(schema)(value) is None


def strict_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object that has these properties, all of them and no other, as structured output wants it."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def clipped(value: Any, low: float, high: float) -> float | None:
    """A judge's number within its range; None for what is no finite number, text and booleans among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(min(high, max(low, value)))  # clipped first: a whole number may be too large for a float


def _checked(reply: Any) -> Any:
    """A reply with a message in it; the client library hands on whatever JSON it got."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if not hasattr(message, "content"):
        got = reply.to_dict(warnings=False) if hasattr(reply, "to_dict") else reply
        raise ValueError(f"the server answered with no message: {shown(got, 200)}")
    return reply


def _vectors(reply: Any, count: int) -> tuple[list[list[float]], int]:
    data = getattr(reply, "data", None)
    vectors = [getattr(entry, "embedding", None) for entry in data] if isinstance(data, list) else []
    sound = len(vectors) == count and all(
        isinstance(v, list) and v and all(clipped(x, -LARGEST, LARGEST) == x for x in v) for v in vectors
    )
    if not sound:
        raise ValueError(f"the server answered with no {count} vectors: {str(reply)[:200]}")
    return [[float(x) for x in v or ()] for v in vectors], _count(
        getattr(reply, "usage", None), "prompt_tokens"
    )


def _read(reply: Any, server: JudgeServer) -> Answer:
    message = reply.choices[0].message
    model = printable(reply.model) if isinstance(reply.model, str) and reply.model else server.model
    counts = getattr(reply, "usage", None)
    usage = TokenUsage(
        prompt=_count(counts, "prompt_tokens"),
        completion=_count(counts, "completion_tokens"),
        cached=_count(getattr(counts, "prompt_tokens_details", None), "cached_tokens"),
    )

    def failed(fault: Fault, details: str) -> Answer:
        return Answer(None, model, usage, fault, printable(details)[:1000], Outcome.CRASHED)

    refusal = getattr(message, "refusal", None)
    finish = getattr(reply.choices[0], "finish_reason", None)
    if refusal or finish == "content_filter":
        return failed(Fault.MODEL_GRADER_REFUSAL, f"{model} refused: {refusal or 'content filter'}")
    try:
        value = json.loads(message.content)
        value = json.loads(printable(json.dumps(value, ensure_ascii=False)))
    except (TypeError, ValueError, RecursionError):
        cut = ", cut off at its token limit" if finish == "length" else ""
        return failed(
            Fault.MODEL_GRADER_PARSE, f"{model} answered no JSON{cut}: {shown(message.content, 200)}"
        )
    if not isinstance(value, dict):
        return failed(Fault.MODEL_GRADER_PARSE, f"{model} answered no JSON object: {shown(value, 200)}")
    return Answer(value, model, usage)


def _count(counts: Any, name: str) -> int:
    value = getattr(counts, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

"""Sources -> rows: what a row must look like, and errors that list what does not.

A row is OpenAI's RFT format (`messages` plus any other keys) or anything with a prompt column. All its keys
go to the graders as `item`; only the messages go to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.sources import Problem, RawRow, draw_gym, nearest, read_csv, read_hub, read_jsonl, shown
from graft.errors import ConfigError, DataError
from graft.types import Message, last_asked

ROLES = ("developer", "system", "user", "assistant")

PROBLEMS_SHOWN = 10

NO_TOOLS = "none of these: graft samples text only and cannot call tools; remove it"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set."""

    index: int
    """Position among the rows read, from 0: keys the row's random streams."""

    messages: Sequence[Message]
    """The conversation that the model shall continue."""

    item: Mapping[str, Any]
    """All keys of the row, for graders."""

    question: str
    """As `Prompt.question`."""

    key: str
    """What tells rows apart: the users' texts, white space normalised. Without `system` and `suffix`."""

    where: str
    """For people: file and line, e.g. `rows.jsonl:12`."""


def read_rows(
    source: str | Sequence[Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    limit: int | None,
    seed: int,
    prompt_key: str = "prompt",
    system: str | None = None,
    suffix: str = "",
    base: Path,
) -> list[Row]:
    """Read and check the rows of a source.

    A row with `messages` is taken as OpenAI's format; any other needs `prompt_key`, which holds the user's
    text or a list of messages.

    Args:
        source: rows in memory, or `FILE.jsonl`, `FILE.csv`, `gym:TASK` (reasoning-gym; rows with distinct questions) or
            `hub:NAME`.
        options: for `gym:` the task's settings; for `hub:` `name` and `split`; files have none.
        limit: how many rows to read at most; exactly so many for `gym:`, which has no end and needs it.
        seed: of `gym:` rows. Other sources give their rows in order whatever it is.
        prompt_key: column with the prompt of rows without `messages`; for `gym:` always `question`.
        system: put as a system message before conversations that begin with no system or developer message.
        suffix: added to the end of prompts that come from a column.
        base: folder that relative file names start from.

    Raises:
        ConfigError: the source is of no known kind, or an option means nothing to it.
        DataError: the source cannot be read, is empty, or has rows that cannot be used: the first ten are
            listed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"data.rows = {limit}: wants at least 1 row.")
    name = source if isinstance(source, str) else "rows"
    rows: list[Row] = []
    problems: list[Problem] = []
    bad_rows = 0
    raw_rows, prompt_key = _open_source(source, options, limit, seed, prompt_key, base)
    for raw in raw_rows:
        found = [raw] if isinstance(raw, Problem) else list(check_row(raw, prompt_key))
        if found:
            bad_rows += 1
            problems += found
        elif isinstance(raw, RawRow):
            rows.append(row_of(len(rows), raw, prompt_key, system, suffix))
        if len(rows) == limit:
            break
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = (
            f"\n  and {len(problems) - PROBLEMS_SHOWN} more problems"
            if len(problems) > PROBLEMS_SHOWN
            else ""
        )
        count = "1 row" if bad_rows == 1 else f"{bad_rows} rows"
        raise DataError(
            f"{name}: {count} cannot be used:\n{listed}{more}\nMend or remove them; nothing was skipped."
        )
    if not rows:
        raise DataError(f"{name}: no rows in it. Wants at least one.")
    return rows


def check_row(raw: RawRow, prompt_key: str) -> Iterator[Problem]:
    """Everything that keeps a row from being used."""
    row = raw.value
    if row.get("tools"):
        yield Problem(raw.where, "$.tools", shown(row["tools"]), NO_TOOLS)
    if "messages" in row:
        path, value = "$.messages", row["messages"]
    elif prompt_key in row:
        path, value = f"$.{prompt_key}", row[prompt_key]
    else:
        yield Problem(
            raw.where,
            "$",
            f"the keys {shown(list(row), 120)}",
            f"'messages' or the prompt column {prompt_key!r}; set data.prompt_key. "
            f"{nearest(prompt_key, row)}",
        )
        return
    if isinstance(value, str) and path != "$.messages":
        if not value.strip():
            yield Problem(raw.where, path, "empty text", "the prompt")
    elif isinstance(value, list) and value:
        for position, message in enumerate(value):
            for inner, got, wants in _check_message(message, last=position == len(value) - 1):
                yield Problem(raw.where, f"{path}[{position}]{inner}", got, wants)
    else:
        yield Problem(raw.where, path, shown(value), "a list of messages with at least one entry")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        got = f"a value that is not JSON: {ascii(str(error))[1:-1]}"
        yield Problem(raw.where, "$", got, "text, finite numbers, lists and objects only; mend or drop it")


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """A message's content as one string: text parts stand on lines of their own."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def key_of(messages: Sequence[Message]) -> str:
    """The users' texts (all texts if there is no user), each run of white space made one space."""
    users = [message for message in messages if message["role"] == "user"] or messages
    return " ".join(" ".join(text_of(message["content"]) for message in users).split())


def _open_source(
    source: str | Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    limit: int | None,
    seed: int,
    prompt_key: str,
    base: Path,
) -> tuple[Iterator[RawRow | Problem], str]:
    """The reader of a source, and the name of its prompt column."""
    if not isinstance(source, str):
        if options:
            raise ConfigError(f"rows in memory have no options; remove data.options ({', '.join(options)}).")
        return (_in_memory(index, row) for index, row in enumerate(source)), prompt_key
    kind, separator, name = source.partition(":")
    if separator and kind == "gym":
        if limit is None:
            raise ConfigError(
                f"{source}: a gym: source has no end; say how many rows to draw, e.g. data.rows = 2000."
            )
        return draw_gym(name, options, rows=limit, seed=seed), "question"
    if separator and kind == "hub":
        return read_hub(name, options), prompt_key
    readers = {".jsonl": read_jsonl, ".csv": read_csv}
    path = base / Path(source).expanduser()
    if path.suffix.lower() not in readers:
        raise ConfigError(f"data.source = {source!r}: wants FILE.jsonl, FILE.csv, gym:TASK or hub:NAME.")
    if options:
        raise ConfigError(f"{source}: a file has no options; remove data.options ({', '.join(options)}).")
    return readers[path.suffix.lower()](path), prompt_key


def _in_memory(index: int, row: Any) -> RawRow | Problem:
    if isinstance(row, Mapping):
        return RawRow(f"rows[{index}]", dict(row))
    return Problem(f"rows[{index}]", "$", shown(row), "a mapping, e.g. {'messages': [...]}")


def row_of(index: int, raw: RawRow, prompt_key: str, system: str | None = None, suffix: str = "") -> Row:
    """The row, which `check_row` has found usable."""
    value = raw.value.get("messages", raw.value.get(prompt_key))
    given: list[Message] = (
        [{"role": "user", "content": value}] if isinstance(value, str) else list(value or ())
    )
    messages = given
    if isinstance(value, str) and suffix:
        messages = [{"role": "user", "content": value + suffix}]
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    question = text_of(given[last_asked(given)]["content"]) if given else ""
    return Row(index, tuple(messages), raw.value, question, key_of(given), raw.where)


def _check_message(message: Any, *, last: bool) -> Iterator[tuple[str, str, str]]:
    """Problems of one message: path inside it, what it got, what it wants."""
    if not isinstance(message, dict):
        yield "", shown(message), "an object with role and content"
        return
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            yield f".{key}", shown(message[key]), NO_TOOLS
    role = message.get("role")
    if role in ("tool", "function"):
        yield (
            ".role",
            shown(role),
            f"one of {', '.join(ROLES)}; graft samples text only and cannot call tools",
        )
    elif role not in ROLES:
        yield ".role", shown(role) if "role" in message else "nothing", f"one of {', '.join(ROLES)}"
    elif last and role == "assistant":
        yield ".role", '"assistant"', "user or developer in the last message: the model writes the next one"
    if message.get("audio"):
        yield ".audio", shown(message["audio"]), "text only"
    yield from _check_content(message)


def _check_content(message: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    content = message.get("content")
    if isinstance(content, list) and content:
        for position, part in enumerate(content):
            path = f".content[{position}]"
            if not isinstance(part, dict):
                yield path, shown(part), '{"type": "text", "text": ...}'
            elif part.get("type") != "text":
                yield (
                    f"{path}.type",
                    shown(part.get("type")),
                    '"text": images, audio and files are not supported',
                )
            elif not isinstance(part.get("text"), str):
                yield f"{path}.text", shown(part.get("text")), "text"
        if all(
            isinstance(part, dict) and isinstance(text := part.get("text"), str) and not text.strip()
            for part in content
        ):
            yield ".content", "empty text", "some text"
    elif not isinstance(content, str):
        yield (
            ".content",
            shown(content) if "content" in message else "nothing",
            "text or a list of text parts",
        )
    elif not content.strip():
        yield ".content", "empty text", "some text"

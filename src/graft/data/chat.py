"""Messages -> token ids, with the tokenizer's own chat template. Nobody else in graft templates text.

What a template does with roles and turns is found out by rendering small probe conversations, never by
reading the template's source. Imports neither torch nor transformers: it works on the tokenizer it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from graft.data.rows import Row, text_of
from graft.errors import DataError
from graft.types import Message, Prompt, Tokens

PLAIN = "plain"
"""Name of the template for models without one: the contents, a line each; end-of-sequence after an answer."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)

PROBE = "Graft7probe"
"""A content that no template contains by itself."""

PROBLEMS_SHOWN = 10


class ChatEncoder:
    """Turns conversations into what the model reads and back.

    Args:
        tokenizer: a transformers tokenizer.
        template_kwargs: passed on to the chat template, e.g. `{"enable_thinking": False}`.
        template: a Jinja template to use instead of the tokenizer's own, or `"plain"`.

    Raises:
        DataError: the tokenizer has no chat template and none is given, or the template fails on a plain
            question.
    """

    def __init__(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        if template is not None:
            self._kwargs["chat_template"] = PLAIN_TEMPLATE if template == PLAIN else template
        elif not tokenizer.chat_template:
            raise DataError(
                "the model's tokenizer has no chat template, so it is probably a base model. Use its "
                f"instruct version, or give a template: '{PLAIN}' (the contents, a line each) or Jinja text."
            )
        prompt = self._render([{"role": "user", "content": PROBE}], add_generation_prompt=True)
        self.maps_developer: bool = not self._knows_role("developer")
        """Whether `developer` messages are rendered as `system`, since the template has no developer role."""

        opened = prompt.rpartition(PROBE)[2]
        self.opens_thinking: bool = opened.rfind("<think>") > opened.rfind("</think>")
        """Whether the generation prompt ends inside `<think>`, so that completions begin with a thought."""

        self.end_of_turn: int | None = _end_of_turn(tokenizer, self._render)
        """Token with which the template ends an assistant's turn; None: it uses no special token there."""

    def encode(self, messages: Sequence[Message]) -> Tokens:
        """Token ids of a conversation, generation prompt included.

        Raises:
            DataError: the template refuses the conversation or leaves one of its messages out.
        """
        prepared = [self._prepared(message) for message in messages]
        text = self._render(prepared, add_generation_prompt=True)
        for message in prepared:
            if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
                raise DataError(
                    f"the chat template leaves the {message['role']} message {_shown(message['content'])} "
                    "out or changes it. Put its text into the user message, or give a template of your own."
                )
        return self._ids(text)

    def decode(self, tokens: Tokens | Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode(tokens, skip_special_tokens=True)

    def decode_all(self, tokens: Tokens | Sequence[int]) -> str:
        """The text of token ids, special tokens included: some tokenizers hold tags such as `<think>` for special."""
        return self._decode(tokens, skip_special_tokens=False)

    def _decode(self, tokens: Tokens | Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(
            np.asarray(tokens, dtype=np.int64).tolist(),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def encode_completion(self, text: str) -> Tokens:
        """A worked answer as the model itself would emit it after the generation prompt, end-of-sequence
        included.

        The ids are cut out of the template's rendering of a whole conversation, so prompt ids followed by
        these are exactly what the template makes of the answered conversation. White space around the text is
        the template's.

        Raises:
            DataError: the template renders the answer in another way than after its generation prompt (e.g.
                it inserts or removes thoughts), or no end-of-sequence token is known.
        """
        answered = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": text}]
        rendered = self._render(answered, add_generation_prompt=False)
        prompt = self._render(answered[:1], add_generation_prompt=True)
        end = self._tokenizer.eos_token_id if self.end_of_turn is None else self.end_of_turn
        if end is None:
            raise DataError(
                "neither chat template nor tokenizer has an end-of-sequence token to put after an answer. "
                "Set eos_token in the model's tokenizer_config.json."
            )
        ending = self._tokenizer.convert_ids_to_tokens(end)
        if ending in text:
            raise DataError(
                f"the answer {_shown(text)} contains {ending!r}, which ends an answer; remove it."
            )
        body = rendered.removeprefix(prompt)
        if self.end_of_turn is not None:
            body = body.rpartition(ending)[0]
        if not rendered.startswith(prompt) or body.strip() != text.strip():
            raise DataError(
                f"the chat template renders the answer {_shown(text)} as "
                f"{_shown(rendered[len(_common(rendered, prompt)) :])} after {_shown(prompt[-40:])}, which "
                "is not what the model would emit there. Set chat_template_kwargs (e.g. enable_thinking = "
                "false) or give a template of your own."
            )
        before = self._ids(prompt)
        whole = self._ids(prompt + body)
        if not np.array_equal(whole[: len(before)], before):
            raise DataError(
                f"the answer {_shown(text)} begins with characters that merge with the end of the generation "
                "prompt into other tokens; remove leading white space."
            )
        return np.append(whole[len(before) :], np.int32(end))

    def _prepared(self, message: Message) -> dict[str, Any]:
        """A message with its content as one string and a role that the template has."""
        role = "system" if message["role"] == "developer" and self.maps_developer else message["role"]
        return {**message, "role": role, "content": text_of(message["content"])}

    def _knows_role(self, role: str) -> bool:
        """Whether the template treats a role in a way of its own, rather than printing whatever name it
        gets."""

        def rendered(name: str) -> str | None:
            conversation = [{"role": name, "content": PROBE}, {"role": "user", "content": "x"}]
            try:
                return self._render(conversation, add_generation_prompt=True)
            except DataError:
                return None

        known, unknown = rendered(role), rendered("nonesuch")
        return known is not None and PROBE in known and known != (unknown or "").replace("nonesuch", role)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        except Exception as error:  # Jinja and templates raise whatever they like
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"the chat template refuses a conversation of {roles}: {type(error).__name__}: {error}. "
                "Use roles that the model knows, or give a template of your own."
            ) from error

    def _ids(self, text: str) -> Tokens:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The special token with which a tokenizer's chat template ends an assistant's turn, or None."""
    if not tokenizer.chat_template:
        return None
    return ChatEncoder(tokenizer).end_of_turn


def prompts_from_rows(
    rows: Sequence[Row],
    encoder: ChatEncoder,
    max_prompt_tokens: int,
    *,
    long_prompts: Literal["refuse", "drop"] = "refuse",
) -> list[Prompt]:
    """Encode rows, in order.

    Args:
        rows: as `read_rows` gives them.
        encoder: of the model that will read them.
        max_prompt_tokens: longest prompt, in tokens, generation prompt included.
        long_prompts: `"refuse"` longer ones, or `"drop"` them: the result is shorter by as many as were
            dropped.

    Raises:
        DataError: names the rows that cannot be templated or are too long, or says that every row was
            dropped.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    longest = 0
    for row in rows:
        try:
            tokens = encoder.encode(row.messages)
        except DataError as error:
            problems.append(f"{row.where}: {error}")
            continue
        longest = max(longest, len(tokens))
        if len(tokens) <= max_prompt_tokens:
            prompts.append(Prompt(row.index, row.messages, row.item, tokens, row.question))
        elif long_prompts == "refuse":
            problems.append(f"{row.where}: {len(tokens)} tokens")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise DataError(
            f"{len(problems)} of {len(rows)} rows give no prompt of at most {max_prompt_tokens} tokens "
            f"(the longest has {longest}):\n{shown}{more}\n"
            "Raise data.max_prompt_tokens, set data.long_prompts = 'drop', or mend the rows."
        )
    if rows and not prompts:
        raise DataError(
            f"all {len(rows)} prompts are longer than {max_prompt_tokens} tokens (the longest has "
            f"{longest}). Raise data.max_prompt_tokens."
        )
    return prompts


def _end_of_turn(tokenizer: Any, render: Any) -> int | None:
    """First special token that the template puts after an assistant's content."""
    answered = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        after = render(answered, add_generation_prompt=False).rpartition(PROBE)[2]
    except DataError:  # a template for single turns, as of some base models
        return None
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in special), None)


def _common(left: str, right: str) -> str:
    """The longest beginning that two texts share."""
    length = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    return left[:length]


def _shown(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")

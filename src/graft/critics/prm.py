"""A process reward model on disk as a critic: a transformers token-classification model that judges ends of steps.

The input is TRL's stepwise format: [bos] question, then each thought and a separator. The judgement of thought k is
read at the last token of its separator: r_k = softmax(logits)[label]. S_k = B r_k. P_k = B r_k, or B times the least
of r_1..r_k, or their product. Models with a marker for the end of a step name it as the separator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, Literal

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from graft.critics.scores import failed, overall_score, share_of_time
from graft.data.rows import text_of
from graft.errors import ModelError
from graft.types import Chain, Critique, Outcome, Prompt

Progress = Literal["same", "minimum", "product"]
Template = Literal["plain", "chat"]


class PRMCritic:
    """Judges chains in batches. Shares no weights with the policy."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        scale: float,
        separator: str = "\n",
        template: Template = "plain",
        progress: Progress = "minimum",
        label: int = 1,
        batch_size: int = 8,
    ) -> None:
        """
        Args:
            model: token classification, in evaluation mode.
            tokenizer: the model's.
            scale: B, the highest score.
            separator: text behind each thought.
            template: the texts of the conversation, a line break between them, or the tokenizer's chat template.
            progress: how P_k comes from r_1..r_k.
            label: index of the label that means right.
            batch_size: chains that go through the model at once.

        Raises:
            ModelError: the model has no such label, or the tokenizer no chat template.
        """
        labels = int(model.config.num_labels)
        if labels < 2 or not 0 <= label < labels:
            raise ModelError(
                f"the process reward model has {labels} labels; critic.label = {label} must be one of two or more"
            )
        if template == "chat" and not tokenizer.chat_template:
            raise ModelError(
                "the process reward model's tokenizer has no chat template; set critic.template = 'plain'"
            )
        self._model, self._tokenizer, self._scale = model, tokenizer, scale
        self._separator = self._ids(separator) if separator else []
        self._template, self._progress, self._label, self._batch_size = template, progress, label, batch_size
        self._longest = getattr(model.config, "max_position_embeddings", None)

    def __call__(self, chains: Sequence[Chain]) -> list[Critique]:
        """Critiques in the order of the chains."""
        began = time.perf_counter()
        inputs = [self._encode(chain) for chain in chains]
        critiques: list[Critique | None] = [
            self._unreadable(chain, *each) for chain, each in zip(chains, inputs, strict=True)
        ]
        waiting = [place for place, critique in enumerate(critiques) if critique is None]
        for start in range(0, len(waiting), self._batch_size):
            batch = waiting[start : start + self._batch_size]
            probabilities = self._probabilities([inputs[place] for place in batch])
            for place, own in zip(batch, probabilities, strict=True):
                critiques[place] = self._judge(chains[place], own)
        return share_of_time([critique for critique in critiques if critique is not None], began)

    def _encode(self, chain: Chain) -> tuple[list[int], list[int]]:
        """Token ids, and the place of each thought's last token."""
        ids = self._question(chain.prompt)
        ends = []
        for text in chain.thoughts:
            ids = ids + self._ids(text.strip()) + self._separator
            ends.append(len(ids) - 1)
        return ids, ends

    def _question(self, prompt: Prompt) -> list[int]:
        messages = [
            *({"role": own["role"], "content": text_of(own["content"])} for own in prompt.earlier),
            {"role": "user", "content": prompt.question},
        ]
        if self._template == "chat":
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self._ids(text)
        bos = self._tokenizer.bos_token_id
        text = "\n".join(message["content"] for message in messages)
        return ([] if bos is None else [bos]) + self._ids(text)

    def _unreadable(self, chain: Chain, ids: Sequence[int], ends: Sequence[int]) -> Critique | None:
        """The critique of a chain that need not or cannot go through the model."""
        if not ends:
            return Critique(overall=overall_score(chain.grade, self._scale))
        if ends[0] < 0:
            return failed(Outcome.CRASHED, "question and first thought have no tokens")
        if self._longest is not None and len(ids) > self._longest:
            return failed(
                Outcome.OVER_LIMIT, f"{len(ids)} tokens; the process reward model reads {self._longest}"
            )
        return None

    @torch.inference_mode()
    def _probabilities(self, inputs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """r_1..r_M of each input."""
        device = self._model.device
        longest = max(len(ids) for ids, _ in inputs)
        tokens = torch.zeros(len(inputs), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        logits = self._model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        right = logits.float().softmax(-1)[..., self._label].cpu()
        return [right[row, ends].tolist() for row, (_, ends) in enumerate(inputs)]

    def _judge(self, chain: Chain, probabilities: Sequence[float]) -> Critique:
        if not all(0 <= p <= 1 for p in probabilities):  # also refuses NaN
            return failed(Outcome.NOT_FINITE, f"the process reward model gave {probabilities}")
        combine = {"same": lambda _, new: new, "minimum": min, "product": mul}[self._progress]
        return Critique(
            overall=overall_score(chain.grade, self._scale),
            thoughts=tuple(self._scale * p for p in probabilities),
            progress=tuple(self._scale * p for p in accumulate(probabilities, combine)),
            reasons=tuple(f"right with probability {p:.3f}" for p in probabilities),
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def load_prm(folder: str, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer.

    Raises:
        ModelError: they cannot be loaded, or weights are missing, the head's above all.
    """
    try:
        loaded: Any = AutoModelForTokenClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"critic.model {folder!r} cannot be loaded: {type(error).__name__}: {error}. It needs config.json, weights "
            "and tokenizer of a token-classification model that transformers knows."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"critic.model {folder!r} lacks the weights {', '.join(missing[:5])}: it would judge at random. Is it a "
            "token-classification model?"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer

"""One forward pass of the policy over a packed micro-batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.errors import ModelError
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Prompt
from graft.update import attention
from graft.update.attention import TreeLayout
from graft.update.gradients import embed_in_place
from graft.update.head import AnchorHead, HeadKernels, NativeHead, TokenScores, TorchHead, score_tokens
from graft.update.packing import MicroBatch, pack
from graft.update.value import ValueModel


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of the matrix products: `bf16` (fp32 master weights) or `exact` (the weights' own type)."""

    name: str
    device: torch.device
    native: bool = False
    """bf16 by the native kernels, which stand in the model's linear layers, instead of torch's autocast."""

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""
        if self.name == "bf16" and not self.native:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def head_kernels(self, weight: Tensor) -> HeadKernels:
        """What computes the LM head."""
        if self.native:
            return NativeHead()
        return TorchHead(torch.bfloat16 if self.name == "bf16" else weight.dtype)


class PolicyForward:
    """A Hugging Face causal model, split into the body that sees the packed row and its LM head."""

    def __init__(self, model: PreTrainedModel, precision: Precision, value: ValueModel | None = None) -> None:
        """Prepare a model for packed rows: switches its attention to `graft_tree`, and lets the gradient of its
        embedding be added to in place.

        Args:
            model: transformers' own module; adapters, if any, sit inside its layers.
            precision: of the matrix products.
            value: asked for the values of the same states; a trunk of its own must have `graft_tree` attention, too.

        Raises:
            ModelError: the LM head has a bias.
        """
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = model
        self.precision = precision
        self.value = value
        self._body: nn.Module = model.get_decoder()
        embed_in_place(model.get_input_embeddings())
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"model type '{model.config.model_type}' has no LM head; want a causal language model"
            )
        self._head: nn.Module = head
        if getattr(self._head, "bias", None) is not None:
            raise ModelError("models whose LM head has a bias are not supported yet")

    @property
    def head_weight(self) -> Tensor:
        """Of the LM head: `[vocabulary, width]`."""
        weight: Tensor = self._head.weight  # pyright: ignore[reportAssignmentType]
        return weight

    def __call__(
        self,
        batch: MicroBatch,
        *,
        temperature: float,
        entropy_gradient: bool = False,
        anchor: AnchorHead | None = None,
    ) -> TokenScores:
        """Log-probability, entropy, value and KL of every trained token of the micro-batch, fp32 `[N]`.

        All but the values are of the distribution that the tokens were drawn from: over the kept tokens where it was
        truncated.

        Args:
            batch: packed trees, on the model's device.
            temperature: that of sampling.
            entropy_gradient: whether entropies train.
            anchor: the KL anchor's `states` of the same batch and its head: asks for the exact KL.
        """
        return self.score(
            self.states(batch),
            batch,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
            anchor=anchor,
        )

    def states(self, batch: MicroBatch) -> Tensor:
        """The last hidden states that predict: `[U, width]`."""
        return self._hidden(self._body, batch)

    def score(
        self,
        states: Tensor,
        batch: MicroBatch,
        *,
        temperature: float,
        entropy_gradient: bool = False,
        anchor: AnchorHead | None = None,
    ) -> TokenScores:
        """What a call gives, from the micro-batch's own `states`."""
        scores = score_tokens(
            states,
            self.head_weight,
            batch.targets,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
            kernels=self.precision.head_kernels(self.head_weight),
            kept=batch.kept,
            anchor=anchor,
        )
        return TokenScores(
            scores.logprobs.index_select(0, batch.predictions),
            scores.entropies.index_select(0, batch.predictions),
            None if self.value is None else self._values(self.value, states, batch),
            None if scores.kl is None else scores.kl.index_select(0, batch.predictions),
        )

    def values(self, batch: MicroBatch) -> Tensor:
        """The value of the state before every trained token, fp32 `[N]`. Trains the value model's own parameters
        alone: a trunk that is shared with the policy gets no gradient."""
        assert self.value is not None
        with torch.no_grad():
            hidden = self.states(batch) if self.value.trunk is None else None
        return self._values(self.value, hidden, batch)

    def _hidden(self, body: nn.Module, batch: MicroBatch) -> Tensor:
        with self.precision.autocast():
            hidden = body(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
                tree_layout=TreeLayout.of(batch.spans),
            ).last_hidden_state[0]
        # unlike indexing, whose gradient adds from several threads in any order
        return hidden.index_select(0, batch.predictors)

    def _values(self, value: ValueModel, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        own = hidden if value.trunk is None else self._hidden(value.trunk, batch)
        assert own is not None
        return value(own).index_select(0, batch.predictions)


@torch.no_grad()
def check_packed_forward(forward: PolicyForward, *, tolerance: float = 1e-3) -> None:
    """Compare a packed tree with the model's own forward pass on each of its paths.

    Catches at start what would train wrongly: models that do not take their attention from transformers'
    interface, sliding windows, scaled or capped logits, positions that do not come from `position_ids`.

    Raises:
        ModelError: the log-probabilities differ by more than `tolerance` nats.
    """
    model = forward.model
    tree, credit = _probe_tree(model.config.get_text_config().vocab_size)
    device = model.device
    [batch] = pack([tree], [credit], token_budget=10**9)
    exact = PolicyForward(model, Precision("exact", device))
    packed = exact(batch.to(device), temperature=1.0).logprobs
    model.set_attn_implementation("eager")
    try:
        worst = 0.0
        for where in batch.slices:
            path = torch.tensor(
                [t for i in tree.path(where.node) for t in tree.nodes[i].tokens.tolist()], device=device
            )
            logits = model(input_ids=path[None], use_cache=False).logits[0].float()
            expected = logits.log_softmax(-1)[:-1].gather(1, path[1:, None])[:, 0]
            own = expected[len(path) - 1 - len(tree.nodes[where.node]) :]
            worst = max(worst, float((packed[where.start : where.end] - own).abs().max()))
    finally:
        model.set_attn_implementation(attention.NAME)
    if not worst <= tolerance:
        raise ModelError(
            f"model type '{model.config.model_type}': a packed tree gives log-probabilities that differ by "
            f"{worst:.3g} nats from its own forward pass (allowed: {tolerance}). Its attention, positions or LM "
            "head do not work with packed trees (a short sliding window, ALiBi, capped logits); use another model."
        )


def _probe_tree(vocabulary: int) -> tuple[Tree, Credit]:
    """Prompt of 24 tokens, two thoughts, one of them with two answers: every kind of attention part."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    tokens = torch.tensor(draw(24), dtype=torch.int32).numpy()
    tree = Tree(Prompt(row=0, messages=(), item={}, tokens=tokens, question=""))
    group = tree.new_group()
    first = tree.add(ROOT, draw(9), group=group, kind=Kind.THOUGHT, stop=None)
    tree.add(ROOT, draw(5), group=group, kind=Kind.THOUGHT, stop=None)
    below = tree.new_group()
    tree.add(first, draw(7), group=below, kind=Kind.ANSWER, stop=None)
    tree.add(first, draw(3), group=below, kind=Kind.ANSWER, stop=None)
    ones = {i: torch.ones(len(node)).numpy() for i, node in enumerate(tree.nodes) if i != ROOT}
    return tree, Credit(advantages=ones, weights=ones)

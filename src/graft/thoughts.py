"""Completions -> thoughts -> critiques: the stage between grading and credit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from graft.algorithm_settings import OfThoughts, ThoughtRewards
from graft.config import RunConfig
from graft.crediting_trees import critic_scores
from graft.critics.build import CriticServices, ask, models_of, open_critic
from graft.data.chat import ChatEncoder
from graft.data.sources import shown
from graft.errors import GraderError
from graft.graders import open_grader, open_judges
from graft.grading.grade import sample_of
from graft.grading.schema import GraderSpec
from graft.rollout.engine import Engine
from graft.rollout.sampling import SamplingSettings
from graft.segments.cut import chain_of, chains_of, cut_tree
from graft.segments.cutter import Cutter, Cutting
from graft.segments.settings import open_cutter
from graft.tree import Tree
from graft.types import Chain, Critic, Critique, Grade, Grader, Prompt, Tokens

LeafCritiques = Mapping[int, Critique]
"""Leaf -> critique of the chain that ends there."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What critic and grader said of candidates while their trees grew; grows with each question."""

    critiques: list[Critique] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ThoughtCritic:
    """Cuts completions into thoughts and has them scored."""

    cutter: Cutter
    critic: Critic | None
    """None where the algorithm has none."""

    decode: Callable[[Tokens], str]
    """Token ids -> text without special tokens."""

    tags: Sequence[str]
    """Spellings around thoughts that critics do not see."""

    held: ExitStack

    def cut(
        self, trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]]
    ) -> tuple[list[Tree], list[Mapping[int, Grade]]]:
        """Whole completions become chains; their grades go to the chains' leaves."""
        chains = [cut_tree(tree, self.cutter) for tree in trees]
        moved: list[Mapping[int, Grade]] = [
            {leaf: own[old] for old, leaf in zip(tree.leaves(), chain.leaves(), strict=True)}
            for tree, chain, own in zip(trees, chains, grades, strict=True)
        ]
        return chains, moved

    def begin(self, prompt: Prompt) -> Cutting:
        """The cutting of a completion that grows."""
        return self.cutter.begin(prompt.tokens)

    def criticise(
        self,
        trees: Sequence[Tree],
        grades: Sequence[Mapping[int, Grade]],
        *,
        max_failure_rate: float,
        waiting: Callable[[], None] | None = None,
    ) -> list[LeafCritiques]:
        """Scores of the thoughts of every path.

        Args:
            trees: of thoughts and answers.
            grades: theirs; completions that could not be graded are not shown to the critic.
            max_failure_rate: largest share of paths that the critic may fail on.
            waiting: called now and then while a server is waited for; raises if the user wants to stop.

        Raises:
            GraderError: it failed on more; the message counts the reasons.
        """
        assert self.critic is not None
        chains = [
            {
                leaf: chain
                for leaf, chain in chains_of(tree, own, self.decode, tags=self.tags).items()
                if chain.grade is None or chain.grade.score is not None
            }
            for tree, own in zip(trees, grades, strict=True)
        ]
        flat = [chain for own in chains for chain in own.values()]
        critiques = ask(self.critic, flat, waiting)
        refuse_failures(critiques, flat, max_failure_rate)
        remaining = iter(critiques)
        return [{leaf: next(remaining) for leaf in own} for own in chains]

    def sibling_scores(
        self,
        groups: Sequence[tuple[Tree, Sequence[int]]],
        grader: Grader,
        rewards: ThoughtRewards,
        *,
        scale: float,
        asked: Asked,
    ) -> list[list[float | None]]:
        """Scores of candidates while their trees grow; None for one that could not be judged.

        Args:
            groups: a tree and the candidates in it.
            grader: of those that complete a sample.
            rewards: how scores are processed.
            scale: of the critic.
            asked: is told of each critique and grade.
        """
        assert self.critic is not None
        grades = [self._grades_now(tree, nodes, grader) for tree, nodes in groups]
        chains = [
            chain_of(tree, node, own.get(node), self.decode, tags=self.tags)
            for (tree, nodes), own in zip(groups, grades, strict=True)
            for node in nodes
        ]
        found = self.critic(chains)
        asked.critiques.extend(found)
        asked.grades.extend(grade for own in grades for grade in own.values())
        critiques = iter(found)
        scores = []
        for (tree, nodes), own in zip(groups, grades, strict=True):
            judged = {node: next(critiques) for node in nodes}
            scored = critic_scores(tree, own, judged, rewards, scale=scale)
            scores.append([scored[node][0] if node in scored else None for node in nodes])
        return scores

    def _grades_now(self, tree: Tree, nodes: Sequence[int], grader: Grader) -> dict[int, Grade]:
        ending = [node for node in nodes if tree.ends(node)]
        graded = grader([sample_of(tree, node, self.decode) for node in ending]) if ending else []
        return dict(zip(ending, graded, strict=True))

    def close(self) -> None:
        """Close connections and processes."""
        self.held.close()


def refuse_failures(critiques: Sequence[Critique], chains: Sequence[Chain], max_failure_rate: float) -> None:
    """Raise if the critic failed on too many completions.

    Raises:
        GraderError: counts the reasons, and shows the first of these completions.
    """
    failed = [critique for critique in critiques if not critique.scored]
    if len(failed) > max_failure_rate * len(critiques):
        first = next(chain for critique, chain in zip(critiques, chains, strict=True) if not critique.scored)
        reasons = Counter(f"{critique.outcome}: {critique.problem}" for critique in failed).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise GraderError(
            f"the critic failed on {len(failed)} of {len(critiques)} completions (allowed: "
            f"grading.max_failure_rate = {max_failure_rate:g}). {listed}. The first: row {first.prompt.row}, thoughts "
            f"{shown([*first.thoughts], 300)}, answer {shown(first.answer, 100)}"
        )


def open_thought_critic(
    config: RunConfig,
    settings: OfThoughts,
    encoder: ChatEncoder,
    *,
    engine: Engine,
    grader: Grader,
    sampling: SamplingSettings,
    device: str,
) -> ThoughtCritic:
    """The cutter and the critic that the settings describe, with the servers they need.

    Raises:
        ConfigError: a key, a service or a function is missing.
        GraderError: a library, a server or the sandbox is missing.
        ModelError: a process reward model cannot be used.
    """
    base = Path(config.base)
    with ExitStack() as opened:
        asked = getattr(settings, "critic", None)
        judges = None
        if asked is not None and (models := models_of(asked)):
            judges = open_judges(config.grading.judge, models)
            opened.callback(judges.close)

        def open_inner(spec: GraderSpec) -> Grader:
            inner = open_grader(spec, config.grading, base=base)
            opened.callback(inner.close)
            return inner

        critic = asked and open_critic(
            asked,
            CriticServices(
                base=base,
                judges=judges,
                calls_at_once=config.grading.concurrency,
                open_grader=open_inner,
                engine=engine,
                grader=grader,
                decode=encoder.decode,
                sampling=sampling,
                seed=config.seed,
                device=device,
            ),
        )
        tags = [tag for tag in (settings.segments.think_open, settings.segments.think_close) if tag]
        return ThoughtCritic(
            open_cutter(settings.segments, encoder.decode_all), critic, encoder.decode, tags, opened.pop_all()
        )


def critique_metrics(critiques: Sequence[LeafCritiques], asked: Asked) -> dict[str, object]:
    """What the critic took, of whole completions and while they grew. Empty where there is none."""
    whole = [critique for own in critiques for critique in own.values()]
    flat = [*whole, *asked.critiques]
    if not flat:
        return {}
    usage = [tokens for critique in flat for tokens in critique.usage.values()]
    metrics: dict[str, object] = {
        "critic_failed": sum(not critique.scored for critique in whole),
        "critic_calls": sum(critique.calls for critique in flat),
        "critic_seconds": sum(critique.seconds for critique in flat),
    }
    sampled = sum(critique.sampled_tokens for critique in flat)
    if sampled:
        metrics["critic_tokens_sampled"] = sampled
    if usage:
        metrics["critic_prompt_tokens"] = sum(tokens.prompt for tokens in usage)
        metrics["critic_completion_tokens"] = sum(tokens.completion for tokens in usage)
    return metrics

"""The run: one line a stage, in order. The only module that knows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graft.algorithms import ALGORITHMS, Algorithm, StepCredit
from graft.assemble import Parts, build_forward, frozen_copy, load_worked
from graft.config import GRPO, SFT, Sampling
from graft.data.cursor import PromptCursor
from graft.data.worked import worked_trees
from graft.evaluation import evaluate
from graft.grading.beside import GradingBeside
from graft.interrupt import Interrupt
from graft.memory import memory_errors, peak_memory_gb, return_freed_memory
from graft.model import plain_state
from graft.objective.kl import k3
from graft.phases import Phase, phases_of
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.terminal import Activity, Terminal
from graft.report.trees import tree_record
from graft.rollout.engine import Finished
from graft.rollout.grow import grow_groups
from graft.rollout.sampling import SamplingSettings
from graft.state import checkpoint
from graft.state.checkpoint import Checkpoints
from graft.state.run_state import RunState
from graft.step_records import Step, evaluation_record, step_clock, step_record
from graft.tree import Tree
from graft.types import Grade, Prompt, Purpose
from graft.update.packing import MicroBatch, pack
from graft.update.policy import PolicyForward
from graft.update.step import learning_rate_at, learning_rate_by_share, optimise, score_batches

ACTIVITIES = {Stage.WARM_START: Activity.WARM_START, Stage.TRAIN: Activity.TRAINING}


class Loop:
    """One run in progress."""

    def __init__(self, parts: Parts, folder: RunFolder, terminal: Terminal, interrupt: Interrupt) -> None:
        self.parts = parts
        self.config = parts.config
        self.folder = folder
        self.terminal = terminal
        self.interrupt = interrupt
        self.state = RunState()
        self.phases = phases_of(self.config, training_rows=len(parts.train))
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints",
            keep_last=self.config.checkpoints.keep_last,
            keep_best=self.config.checkpoints.keep_best,
        )
        self.watchers: list[Callable[[dict[str, object]], None]] = [terminal.record]
        self.optimizer: torch.optim.Optimizer | None = None
        self.anchor: PolicyForward | None = None
        self._restored_optimizer: Mapping[str, Tensor] = {}

    def run(self, until: Stage = Stage.TRAIN) -> RunState:
        """Go from where the run stands to its end, or to that of its phase `until`."""
        self.measure(Moment.BEFORE)
        for phase in self.phases:
            self.run_phase(phase)
            self.measure(phase.after)
            self.save()
            if phase.stage is until:
                break
        return self.state

    def run_phase(self, phase: Phase) -> None:
        """The optimiser steps of one phase that are still to do."""
        if self.has_ended(phase):
            return
        algorithm = ALGORITHMS[phase.settings.name]
        cursor = self.open_cursor(phase)
        self.optimizer = self.open_optimizer(phase)
        self.anchor = self.open_anchor(phase)
        self.begin_bar(phase)
        while not self.has_ended(phase):
            drawn_before = self.state.generated_tokens
            with step_clock(self.state.steps.get(phase.stage, 0) + 1) as step:
                self.step(phase, algorithm, step, cursor)
            self.record_step(phase, step, cursor)
            if self.has_ended(phase):
                break
            if phase.stage is Stage.TRAIN and self.is_measuring_due(step.number, drawn_before):
                self.measure(Moment.DURING)
            if _due(self.config.checkpoints.every, step.number):
                self.save()

    def has_ended(self, phase: Phase) -> bool:
        """Whether nothing of it is left to do."""
        steps = self.state.steps.get(phase.stage, 0)
        return phase.ended(steps=steps, generated_tokens=self.state.generated_tokens)

    def is_measuring_due(self, number: int, drawn_before: int) -> bool:
        """Whether held-out rows are to be measured after step `number`, before which so many tokens were drawn."""
        tokens = self.config.evaluation.every_generated_tokens
        reached = tokens is not None and self.state.generated_tokens // tokens > drawn_before // tokens
        return reached or _due(self.config.evaluation.every, number)

    def begin_bar(self, phase: Phase) -> None:
        """Progress in steps, or in tokens where these say how long the phase is."""
        activity = ACTIVITIES[phase.stage]
        if phase.generated_tokens is not None:
            self.terminal.begin_tokens(activity, phase.generated_tokens, done=self.state.generated_tokens)
        else:
            assert phase.steps is not None
            self.terminal.begin(activity, phase.steps, done=self.state.steps.get(phase.stage, 0))

    def step(self, phase: Phase, algorithm: Algorithm, step: Step, cursor: PromptCursor) -> None:
        """Prompts -> trees -> grades -> credit -> batches -> weights."""
        step.prompts = [self.parts.train[place] for place in cursor.take(phase.rows_per_step)]
        if algorithm.samples:
            with step.timed("load"):
                self.load_engine()
            with self.grading() as beside:
                with step.timed("sample"):
                    step.trees = self.sample(phase, step, beside.finished(step.prompts))
                with step.timed("grade"):
                    step.grades = self.grade(beside, step.trees)
        else:
            step.trees = self.work_out(phase, step.prompts)
        step.credit = algorithm.credit(step.trees, step.grades, phase.settings)
        batches = self.pack(step.trees, step.credit)
        self.make_room()
        with step.timed("update"):
            self.update(phase, algorithm, step, batches)
        self.make_room()

    def grading(self) -> GradingBeside:
        """What judges finished samples while others still grow."""
        assert self.parts.grader is not None
        return GradingBeside(self.parts.grader, self.parts.encoder.decode)

    def sample(self, phase: Phase, step: Step, finished: Finished) -> list[Tree]:
        """The engine draws a group of completions for each prompt, and hands over each as it ends."""
        assert self.parts.engine is not None
        assert isinstance(phase.settings, GRPO)
        with memory_errors("sampling", "rollout.slots, training.prompts_per_step or sampling.max_new_tokens"):
            return grow_groups(
                self.parts.engine,
                step.prompts,
                group_size=phase.settings.group_size,
                sampling=sampling_settings(self.config.sampling),
                seed=self.config.seed,
                purpose=Purpose.TRAIN,
                step=step.number,
                progress=self.on_tokens,
                finished=finished,
            )

    def grade(self, beside: GradingBeside, trees: Sequence[Tree]) -> list[Mapping[int, Grade]]:
        """The grader has judged every completion."""
        rate = self.config.grading.max_failure_rate
        return beside.grades(trees, max_failure_rate=rate, waiting=self.interrupt.check)

    def work_out(self, phase: Phase, prompts: Sequence[Prompt]) -> list[Tree]:
        """Rows bring their own completions."""
        assert isinstance(phase.settings, SFT)
        worked = load_worked(phase.settings.worked, Path(self.config.base))
        return worked_trees(prompts, worked, self.parts.encoder)

    def pack(self, trees: Sequence[Tree], credit: StepCredit) -> list[MicroBatch]:
        """Flat rows with every span once, on the model's device."""
        batches = pack(trees, credit.trees, token_budget=self.config.training.microbatch_tokens)
        return [batch.to(self.parts.device) for batch in batches]

    def update(self, phase: Phase, algorithm: Algorithm, step: Step, batches: Sequence[MicroBatch]) -> None:
        """One or more optimiser steps on the batch."""
        assert self.optimizer is not None
        settings, temperature = phase.settings, self.config.sampling.temperature
        updates = settings.updates_per_batch if isinstance(settings, GRPO) else 1
        with memory_errors(
            "the update", "training.microbatch_tokens, or set model.gradient_checkpointing = true"
        ):
            anchor, old = self.score(phase, step, batches, need_old=updates > 1)
            for pass_number in range(updates):
                # once the weights have moved, only the whole step leaves a state that can be saved
                may_stop = pass_number == 0
                step.result = optimise(
                    self.parts.forward,
                    self.optimizer,
                    batches,
                    lambda tokens: algorithm.loss(tokens, settings),
                    temperature=temperature,
                    max_gradient_norm=phase.optimizer.max_gradient_norm,
                    learning_rate=self.learning_rate(phase, step.number),
                    entropy_gradient=isinstance(settings, GRPO) and settings.entropy.coefficient != 0,
                    old_logprobs=old,
                    anchor_logprobs=anchor,
                    progress=self.on_microbatch if may_stop else None,
                    where=f"{ACTIVITIES[phase.stage]} step {step.number}",
                )

    def score(
        self, phase: Phase, step: Step, batches: Sequence[MicroBatch], *, need_old: bool
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Log-probabilities that stay fixed during the step: the anchor's and the rollout's, where needed."""
        temperature = self.config.sampling.temperature
        report_kl = phase.stage is Stage.TRAIN and _due(self.config.report.kl_every, step.number)
        penalised = isinstance(phase.settings, GRPO) and phase.settings.kl.coefficient != 0
        anchor = old = None
        if self.anchor is not None and (penalised or report_kl):
            anchor = score_batches(self.anchor, batches, temperature=temperature)
        if need_old or (anchor is not None and report_kl):
            old = score_batches(self.parts.forward, batches, temperature=temperature)
        if anchor is not None and old is not None and report_kl and batches:
            estimates = torch.cat([k3(o, a) for o, a in zip(old, anchor, strict=True)])
            step.kl_to_initial = float(estimates.double().mean())
        return anchor if penalised else None, old if need_old else None

    def measure(self, moment: Moment) -> None:
        """Sample and grade held-out rows; before and after training all of them, once."""
        settings, parts = self.config.evaluation, self.parts
        if (
            not parts.held_out
            or parts.engine is None
            or parts.grader is None
            or moment in self.state.measured
        ):
            return
        during = moment is Moment.DURING
        prompts = parts.held_out[: settings.rows] if during else parts.held_out
        if not during:
            self.terminal.begin(Activity.MEASURING, len(prompts))
        began = time.perf_counter()
        self.load_engine()
        with memory_errors("the evaluation", "rollout.slots or sampling.max_new_tokens"):
            evaluation = evaluate(
                parts.engine,
                prompts,
                parts.grader,
                parts.encoder.decode,
                samples=settings.samples,
                sampling=sampling_settings(self.config.sampling, temperature=settings.temperature),
                threshold=settings.threshold,
                seed=self.config.seed,
                max_failure_rate=self.config.grading.max_failure_rate,
                progress=self.on_tokens,
                waiting=self.interrupt.check,
            )
        done = self.state.steps.get(Stage.TRAIN, 0)
        record = evaluation_record(
            evaluation,
            moment=moment,
            step=done,
            generated_tokens=self.state.generated_tokens,
            seconds=time.perf_counter() - began,
        )
        self.append(record)
        if not during:
            self.state.measured.append(str(moment))
            for tree, grades in zip(evaluation.trees, evaluation.grades, strict=True):
                self.folder.append_tree(
                    tree_record(done, Stage.EVALUATION, tree, grades, parts.encoder.decode, moment=moment)
                )
        self.state.score = evaluation.accuracy.mean

    # -- where the run stands ----------------------------------------------------------------------------------

    def record_step(self, phase: Phase, step: Step, cursor: PromptCursor) -> None:
        """Count the step as done and write what happened."""
        learning_rate = self.learning_rate(phase, step.number)
        self.state.steps[phase.stage] = step.number
        self.state.cursors[phase.stage] = cursor.state()
        self.state.train_seconds += step.seconds["step"]
        self.state.generated_tokens += sum(tree.sampled_tokens for tree in step.trees)
        if phase.stage is Stage.TRAIN and self.config.report.trees == "all" and step.grades:
            assert step.credit is not None
            for tree, grades, credit in zip(step.trees, step.grades, step.credit.trees, strict=True):
                decode = self.parts.encoder.decode
                self.folder.append_tree(tree_record(step.number, phase.stage, tree, grades, decode, credit))
        self.append(
            step_record(
                step,
                stage=phase.stage,
                learning_rate=learning_rate,
                threshold=self.config.evaluation.threshold,
                generated_tokens=self.state.generated_tokens,
                peak_memory_gb=peak_memory_gb(self.parts.device),
            )
        )
        self.interrupt.check()

    def append(self, record: dict[str, object]) -> None:
        """A line of metrics, to the run folder and to whoever watches."""
        self.folder.append_metrics(record)
        for watcher in self.watchers:
            watcher(record)

    def save(self) -> None:
        """Write a checkpoint of the state between two steps, unless it is there already."""
        if self.state.number in self.checkpoints.steps():
            return
        self.folder.sync()
        weights = checkpoint.trainable_parameters(self.parts.policy.model)
        self.checkpoints.save(
            self.state.number,
            weights=weights,
            optimizer={} if self.optimizer is None else checkpoint.optimizer_tensors(self.optimizer, weights),
            state={
                "run": self.state.to_json(),
                "offsets": self.folder.offsets(),
                "fingerprint": dict(self.parts.fingerprint),
            },
            score=self.state.score,
        )

    def restore(self) -> bool:
        """Take over the newest checkpoint and cut the run's files back to it; whether there was one."""
        found = self.checkpoints.load_newest()
        if found is None:
            self.folder.cut_back(dict.fromkeys(self.folder.offsets(), 0))
            return False
        self.folder.cut_back(found.state["offsets"])
        self.state = RunState.from_json(found.state["run"])
        checkpoint.load_parameters(self.parts.policy.model, found.weights)
        self._restored_optimizer = found.optimizer
        former = found.state["fingerprint"]
        for name, value in self.parts.fingerprint.items():
            if former.get(name) != value:
                self.terminal.say(
                    f"not the same to the bit from here: {name} was {former.get(name)!r} and is {value!r} now"
                )
        return True

    def open_cursor(self, phase: Phase) -> PromptCursor:
        """The phase's place in the training rows."""
        epochs = self.config.training.epochs if phase.stage is Stage.TRAIN else None
        cursor = PromptCursor(
            len(self.parts.train),
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
            epochs=epochs,
        )
        if phase.stage in self.state.cursors:
            cursor.restore(self.state.cursors[phase.stage])
        return cursor

    def open_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """AdamW, fresh at the start of a phase."""
        weights = checkpoint.trainable_parameters(self.parts.policy.model)
        optimizer = torch.optim.AdamW(
            weights.values(),
            lr=phase.optimizer.learning_rate,
            betas=phase.optimizer.betas,
            eps=phase.optimizer.epsilon,
            weight_decay=phase.optimizer.weight_decay,
            fused=True,
        )
        if self.state.steps.get(phase.stage, 0):
            checkpoint.load_optimizer_tensors(optimizer, weights, self._restored_optimizer)
        self._restored_optimizer = {}
        return optimizer

    def open_anchor(self, phase: Phase) -> PolicyForward | None:
        """A frozen copy of the model that training starts with, where KL to it is penalised or reported."""
        penalised = isinstance(phase.settings, GRPO) and phase.settings.kl.coefficient != 0
        if phase.stage is not Stage.TRAIN or not (penalised or self.config.report.kl_every):
            return None
        policy = self.parts.policy
        if self.state.steps.get(phase.stage, 0):
            weights = self.checkpoints.load_anchor()
        else:
            weights = {name: tensor.detach().clone() for name, tensor in plain_state(policy).items()}
            self.checkpoints.save_anchor(weights)
        return build_forward(frozen_copy(policy, weights), self.parts.forward.precision)

    def make_room(self) -> None:
        """Between sampling and the update: neither needs the other's memory."""
        if self.parts.engine is not None:
            self.parts.engine.drop_weights()
        return_freed_memory()

    def load_engine(self) -> None:
        """Give the engine the policy's weights if it has older ones."""
        engine = self.parts.engine
        assert engine is not None
        if engine.version != self.state.number:
            engine.load_weights(plain_state(self.parts.policy), self.state.number)

    def learning_rate(self, phase: Phase, number: int) -> float:
        """Of step `number`, the first being 1; asked before the step's tokens are counted as drawn."""
        schedule = {
            "peak": phase.optimizer.learning_rate,
            "schedule": phase.optimizer.schedule,
            "warmup_steps": phase.optimizer.warmup_steps,
            "final_fraction": phase.optimizer.final_fraction,
        }
        if phase.generated_tokens is not None:
            share = self.state.generated_tokens / phase.generated_tokens
            return learning_rate_by_share(number - 1, share=share, **schedule)
        assert phase.steps is not None
        return learning_rate_at(number - 1, steps=phase.steps, **schedule)

    def on_tokens(self, tokens: int) -> None:
        """The engine has drawn so many tokens in this call."""
        self.interrupt.check()
        self.terminal.sampled(tokens)

    def on_microbatch(self, tokens: int) -> None:
        """So many tokens have been through forward and backward."""
        self.interrupt.check()


def sampling_settings(sampling: Sampling, *, temperature: float | None = None) -> SamplingSettings:
    """The section as plain values."""
    return SamplingSettings(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature if temperature is None else temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0

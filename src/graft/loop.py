"""The run: one line a stage, in order. The only module that knows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from graft.algorithm_settings import SFT, OnTrees, Sampled
from graft.algorithms import ALGORITHMS, Algorithm
from graft.assemble import Parts, load_worked
from graft.collect import Drawn, collect, has_signal
from graft.crediting import Evidence, StepCredit, credit_needs_appraisal
from graft.data.cursor import PromptCursor
from graft.data.worked import worked_trees
from graft.drawing import criticise, draw
from graft.evaluation import Evaluation
from graft.grading.beside import GradingBeside
from graft.interrupt import Interrupt
from graft.measuring import early_stop, evaluate_held_out, validate_held_out
from graft.memory import peak_memory_gb
from graft.model import plain_state
from graft.phases import Phase, phases_of
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.terminal import Activity, Terminal
from graft.report.trees import tree_record
from graft.rollout.engine import Finished
from graft.state import checkpoint
from graft.state.checkpoint import Checkpoint, Checkpoints
from graft.state.run_state import RunState
from graft.step_records import Step, Validation, evaluation_record, mean_kl, step_clock, step_record
from graft.trainer import Trainer, everything, everything_else, penalised
from graft.tree import Grown, Tree
from graft.types import Appraisal, Credit, Grade, Prompt
from graft.update.step import POLICY, StepResult

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
        self.trainer: Trainer | None = None
        self._restored: Checkpoint | None = None

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
        cursor = self.open_cursor(phase)
        done = self.state.steps.get(phase.stage, 0)
        self.trainer = Trainer(
            self.parts, phase, self.checkpoints, done=done, restored=self._restored if done else None
        )
        self._restored = None
        self.begin_bar(phase)
        while not self.has_ended(phase):
            if self.state.measuring_due:  # the run was stopped between a step and its measurement
                self.measure(Moment.DURING)
                continue
            if cursor.remaining == 0:
                self.terminal.say("the training rows are used up: the run ends here")
                return
            drawn_before = self.state.generated_tokens
            with step_clock(self.state.steps.get(phase.stage, 0) + 1) as step:
                self.step(phase, step, cursor)
                if _due(phase.validate_every, step.number):
                    # Ctrl-C waits: the weights have moved, and the step is not counted yet
                    step.validation = validate_held_out(self.parts, phase)
            self.record_step(phase, step, cursor)
            self.watch(phase, step.validation, step.number)
            if self.has_ended(phase):
                break
            self.state.measuring_due = phase.stage is Stage.TRAIN and self.is_measuring_due(
                step.number, drawn_before
            )
            self.interrupt.check()
            if self.state.measuring_due:
                self.measure(Moment.DURING)
            if not self.has_ended(phase) and _due(self.config.checkpoints.every, step.number):
                self.save()

    def has_ended(self, phase: Phase) -> bool:
        """Whether nothing of it is left to do."""
        if phase.stage in self.state.stopped_early:
            return True
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

    def step(self, phase: Phase, step: Step, cursor: PromptCursor) -> None:
        """Prompts -> trees -> grades -> credit -> batches -> weights."""
        algorithm = ALGORITHMS[phase.settings.name]
        if algorithm.samples:
            self.collect(phase, step, cursor)
        else:
            step.trees = self.work_out(phase, cursor.take(phase.rows_per_step))
        self.make_room()
        with step.timed("update"):
            step.credit = self.credit(phase, algorithm, step)
            step.result = self.update(phase, step)

    def collect(self, phase: Phase, step: Step, cursor: PromptCursor) -> None:
        """Sample and grade until the batch is full."""
        trainer = self.trainer_of_phase
        with step.timed("load"), trainer.as_sampled(step.number):
            self.load_engine(age=trainer.age(step.number))

        def draw_round(places: Sequence[int], attempts: Sequence[int]) -> Drawn:
            prompts = [self.parts.train[place] for place in places]
            with self.grading() as beside:
                with step.timed("sample"):
                    on_trees = isinstance(phase.settings, OnTrees)
                    finished = None if on_trees else beside.finished(prompts)
                    trees, step.grown = self.sample(phase, step, attempts, prompts, finished)
                with step.timed("grade"):
                    grades = self.grade(beside, trees)
            return Drawn(list(places), prompts, list(trees), grades)

        collected = collect(
            cursor.take,
            cursor.put_back,
            draw_round,
            wanted=phase.rows_per_step,
            max_rounds=getattr(phase.settings, "max_sampling_rounds", 1),
        )
        step.trees, step.grades = collected.kept.trees, collected.kept.grades
        step.discarded, step.rounds = collected.discarded, collected.rounds
        self.tell_short_batch(phase, step)
        if self.parts.critic is not None:
            assert isinstance(phase.settings, Sampled)
            with step.timed("critic"):
                step.trees, step.grades, step.critiques = criticise(
                    self.parts.critic,
                    phase.settings,
                    step.trees,
                    step.grades,
                    max_failure_rate=self.config.grading.max_failure_rate,
                    waiting=self.interrupt.check,
                )

    def tell_short_batch(self, phase: Phase, step: Step) -> None:
        """Dynamic sampling may end with fewer groups than a step is to have."""
        useful = sum(has_signal(grades) for grades in step.grades)
        if step.rounds > 1 and useful < phase.rows_per_step:
            self.terminal.say(
                f"step {step.number}: {useful} of {phase.rows_per_step} groups have signal after {step.rounds} rounds "
                f"of sampling; it trains on {len(step.trees)}"
            )

    def grading(self) -> GradingBeside:
        """What judges finished samples while others still grow."""
        assert self.parts.grader is not None
        return GradingBeside(self.parts.grader, self.parts.encoder.decode)

    def sample(
        self,
        phase: Phase,
        step: Step,
        attempts: Sequence[int],
        prompts: Sequence[Prompt],
        finished: Finished | None,
    ) -> tuple[Sequence[Tree], Sequence[Grown]]:
        """The engine draws trees, and hands over each whole completion as it ends."""
        assert isinstance(phase.settings, Sampled)
        return draw(
            self.parts,
            phase.settings,
            prompts,
            step=step.number,
            attempts=attempts,
            progress=self.on_tokens,
            finished=finished,
            asked=step.asked,
        )

    def grade(self, beside: GradingBeside, trees: Sequence[Tree]) -> list[Mapping[int, Grade]]:
        """The grader has judged every completion."""
        rate = self.config.grading.max_failure_rate
        return beside.grades(trees, max_failure_rate=rate, waiting=self.interrupt.check)

    def work_out(self, phase: Phase, places: Sequence[int]) -> list[Tree]:
        """Rows bring their own completions."""
        assert isinstance(phase.settings, SFT)
        worked = load_worked(phase.settings.worked, Path(self.config.base))
        prompts = [self.parts.train[place] for place in places]
        return worked_trees(prompts, worked, self.parts.encoder)

    def credit(self, phase: Phase, algorithm: Algorithm, step: Step) -> StepCredit:
        """Who is compared with whom; asks the networks first where the credit depends on them."""
        settings = phase.settings
        if credit_needs_appraisal(settings):
            step.appraisals = self.appraise(
                step,
                [everything(tree) for tree in step.trees],
                old=True,
                anchor=penalised(phase) or self.is_kl_due(phase, step.number),
            )
        evidence = Evidence(
            trees=step.trees,
            grades=step.grades,
            critiques=step.critiques,
            appraisals=step.appraisals,
            longest=self.config.sampling.max_new_tokens,
            carried=self.state.carried,
        )
        return algorithm.credit(evidence, settings)

    def appraise(self, step: Step, trained: Sequence[Credit], *, old: bool, anchor: bool) -> list[Appraisal]:
        """What networks say of the step's tokens, the policy and the value model with the weights that sampled."""
        trainer = self.trainer_of_phase
        with trainer.as_sampled(step.number):
            return trainer.appraise(step.trees, trained, old=old, anchor=anchor, progress=self.on_microbatch)

    def is_kl_due(self, phase: Phase, number: int) -> bool:
        """Whether KL of the policy that sampled to the initial model is reported after step `number`: when the settings
        say so, and always where the penalty is that of the policy that sampled, which trains nothing."""
        if phase.stage is not Stage.TRAIN or not isinstance(phase.settings, Sampled):
            return False
        reported_alone = penalised(phase) and getattr(phase.settings.kl, "of", "policy") == "rollout"
        return reported_alone or _due(self.config.report.kl_every, number)

    def update(self, phase: Phase, step: Step) -> StepResult:
        """One or more optimiser steps on the batch."""
        assert step.credit is not None
        trainer = self.trainer_of_phase
        report_kl = self.is_kl_due(phase, step.number)
        anchor = report_kl or penalised(phase)
        several = isinstance(phase.settings, Sampled) and phase.settings.updates > 1
        needs_old = several or trainer.age(step.number) > 0
        if not step.appraisals and (anchor or needs_old):
            step.appraisals = self.appraise(
                step, step.credit.trees, old=report_kl or needs_old, anchor=anchor
            )
        if report_kl:  # of all that was sampled: groups without signal are not like the others
            rest = [everything_else(tree, own) for tree, own in zip(step.trees, step.appraisals, strict=True)]
            others = self.appraise(step, rest, old=True, anchor=True)
            step.kl_to_initial = mean_kl([*step.appraisals, *others])
        if not needs_old:  # the forward pass of the one update gives the old log-probabilities, to the bit
            step.appraisals = [replace(own, old_logprobs={}) for own in step.appraisals]
        rates = trainer.learning_rates(step.number, self.state.generated_tokens)
        step.learning_rate = 0.0 if trainer.warming_up(step.number) else rates[POLICY]
        return trainer.update(
            step.number,
            rates,
            step.trees,
            step.credit,
            step.appraisals or None,
            progress=self.on_microbatch,
            where=f"{ACTIVITIES[phase.stage]} step {step.number}",
        )

    def measure(self, moment: Moment) -> None:
        """Measure on held-out rows; before and after training on all of them, once."""
        samples = self.parts.engine is not None and self.parts.grader is not None
        phase = self.phases[0 if moment in (Moment.BEFORE, Moment.AFTER_WARM_START) else -1]
        if not self.parts.held_out or moment in self.state.measured or not (samples or phase.validates):
            return
        began = time.perf_counter()
        validation = validate_held_out(self.parts, phase, progress=self.on_microbatch)
        evaluation = self.evaluate(moment) if samples else None
        done = self.state.steps.get(Stage.TRAIN, 0)
        self.append(
            evaluation_record(
                evaluation,
                validation,
                moment=moment,
                step=done,
                generated_tokens=self.state.generated_tokens,
                seconds=time.perf_counter() - began,
            )
        )
        if moment is not Moment.DURING:
            self.state.measured.append(str(moment))
        if evaluation is not None:
            self.state.score = evaluation.accuracy.mean
            if moment is not Moment.DURING:
                for tree, grades in zip(evaluation.trees, evaluation.grades, strict=True):
                    self.folder.append_tree(
                        tree_record(
                            done, Stage.EVALUATION, tree, grades, self.parts.encoder.decode, moment=moment
                        )
                    )
        elif validation is not None:
            self.state.score = -validation.loss
        self.state.measuring_due = False
        self.watch(phase, validation, self.state.steps.get(phase.stage, 0))

    def evaluate(self, moment: Moment) -> Evaluation:
        """Sample and grade held-out rows, between training steps the first of them."""
        during, rows = moment is Moment.DURING, self.parts.held_out
        prompts = rows[: self.config.evaluation.rows] if during else rows
        if not during:
            self.terminal.begin(Activity.MEASURING, len(prompts))
        self.load_engine()
        return evaluate_held_out(self.parts, prompts, progress=self.on_tokens, waiting=self.interrupt.check)

    def watch(self, phase: Phase, validation: Validation | None, steps: int) -> None:
        """End the phase after so many steps if its validation loss falls no longer."""
        if validation is None or self.has_ended(phase):
            return
        reason = early_stop(self.state, phase, validation.loss)
        if reason is not None:
            line = f"{ACTIVITIES[phase.stage]} ended early, after step {steps}: {reason}"
            self.state.stopped_early[phase.stage] = line
            self.terminal.say(line)

    # -- where the run stands ----------------------------------------------------------------------------------

    def record_step(self, phase: Phase, step: Step, cursor: PromptCursor) -> None:
        """Count the step as done and write what happened."""
        self.state.steps[phase.stage] = step.number
        self.state.cursors[phase.stage] = cursor.state()
        self.state.train_seconds += step.seconds["step"]
        self.state.generated_tokens += step.sampled_tokens
        assert step.credit is not None
        if phase.stage is Stage.TRAIN:
            self.state.carried = dict(step.credit.carried)
        if phase.stage is Stage.TRAIN and self.config.report.trees == "all" and step.grades:
            for index, tree in enumerate(step.trees):
                self.folder.append_tree(
                    tree_record(
                        step.number,
                        phase.stage,
                        tree,
                        step.grades[index],
                        self.parts.encoder.decode,
                        step.credit.trees[index],
                        critiques=step.critiques[index] if step.critiques else None,
                        details=step.credit.details[index] if step.credit.details else None,
                        survivors=step.grown[index].survivors if step.grown else None,
                    )
                )
        self.append(
            step_record(
                step,
                stage=phase.stage,
                learning_rate=step.learning_rate,
                threshold=self.config.evaluation.threshold,
                generated_tokens=self.state.generated_tokens,
                peak_memory_gb=peak_memory_gb(self.parts.device),
            )
        )
        self.trainer_of_phase.moved = False

    @property
    def is_whole(self) -> bool:
        """Whether weights and counts belong together, so that a checkpoint may be written."""
        return self.trainer is None or not self.trainer.moved

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
        trainer = self.trainer
        self.checkpoints.save(
            self.state.number,
            weights=checkpoint.trainable_parameters(self.parts.policy.model),
            optimizer={}
            if trainer is None
            else checkpoint.optimizer_tensors(trainer.optimizer, trainer.parameters()),
            values={}
            if trainer is None or trainer.value is None
            else checkpoint.trainable_parameters(trainer.value),
            rollout={}
            if trainer is None
            else trainer.rollout_weights(self.state.steps.get(trainer.phase.stage, 0) + 1),
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
        self.terminal.recall(self.folder.read_metrics())
        self.state = RunState.from_json(found.state["run"])
        checkpoint.load_parameters(self.parts.policy.model, found.weights)
        self._restored = found
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

    @property
    def trainer_of_phase(self) -> Trainer:
        """What trains now."""
        assert self.trainer is not None
        return self.trainer

    def make_room(self) -> None:
        """Between sampling and the update: neither needs the other's memory."""
        if self.parts.engine is not None:
            self.parts.engine.drop_weights()

    def load_engine(self, *, age: int = 0) -> None:
        """Give the engine the policy's weights if it has others.

        Args:
            age: steps since the policy had the weights that it holds now.
        """
        engine, version = self.parts.engine, self.state.number - age
        assert engine is not None
        if engine.version != version:
            engine.load_weights(plain_state(self.parts.policy), version)

    def on_tokens(self, tokens: int) -> None:
        """The engine has drawn so many tokens in this call."""
        self.interrupt.check()
        self.terminal.sampled(tokens)

    def on_microbatch(self, tokens: int) -> None:
        """So many tokens have been through forward and backward."""
        self.interrupt.check()


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0

"""The one settings tree of a run: TOML, then `--set a.b=c`, checked at the edge. Imports no torch.

Functions below the loop receive plain values, never these objects. Unknown keys are refused with the nearest
name; each algorithm has its own section class, so a key that means nothing to it is unknown there.
The docstring under a field is its help text and its line in `docs/reference/settings.md`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from graft.algorithm_parts import EarlyStopping
from graft.algorithm_settings import GRPO, SFT, AlgorithmSettings, OnTrees, Sampled
from graft.grading.settings import check_section, with_what_the_grader_says
from graft.section import Section


class Adapter(Section):
    """LoRA through PEFT. Leave the section out for a full fine-tune."""

    rank: int = Field(default=16, ge=1)
    """Rank of the low-rank update."""

    alpha: float = Field(default=32.0, gt=0)
    """Scale of the update: `alpha / rank` multiplies it."""

    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter. Empty: all linear layers but the LM head."""


class Model(Section):
    """The policy's first weights and how they are held."""

    name: str
    """Embedded name (`graft model list`), folder, `.gguf` file or hub id. No default: it decides everything."""

    adapter: Adapter | None = None
    """LoRA settings; without the section all weights train."""

    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""

    precision: Literal["auto", "bf16", "exact"] = "auto"
    """`bf16`: fp32 master weights, bf16 matrix products; `exact`: fp32 throughout; `auto`: bf16 where this machine
    multiplies it faster than fp32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. `{ enable_thinking = false }`."""


class Data(Section):
    """Where the rows come from. Train and held-out rows never share a question."""

    source: str | None = None
    """`rows.jsonl` (OpenAI's RFT format or a prompt column), `rows.csv`, `gym:NAME` or `hub:NAME`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the source: the settings of reasoning-gym's task, or the hub's `name` (the data set's configuration)
    and `split`."""

    rows: int | None = Field(default=None, ge=1)
    """How many rows to read, held-out rows included. Needed for `gym:`, which has no end."""

    held_out: int = Field(default=0, ge=0)
    """Rows kept for evaluation, split off by question text."""

    held_out_source: str | None = None
    """A source of its own for the held-out rows, instead of splitting. A question shared with it is refused."""

    prompt_key: str = "prompt"
    """Column that holds the prompt where a row has no `messages`."""

    system: str | None = None
    """System message put before a prompt that has none."""

    suffix: str = ""
    """Text added to the end of every prompt column, e.g. the format that the answer shall have."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt; a longer one is handled as `long_prompts` says."""

    long_prompts: Literal["refuse", "drop"] = "refuse"
    """`refuse`: an error that names the rows; `drop`: leave them out and count them."""

    shuffle: bool = True
    """Visit the rows in a new random order each epoch; the order depends on the seed alone."""


class JudgeModel(Section):
    """Where one judge model is reached; what is left out is as in `[grading.judge]`."""

    base_url: str | None = None
    """Server, e.g. `http://127.0.0.1:8000/v1`."""

    model: str | None = None
    """The server's name for the model. Default: the name that the grader uses."""

    api_key_env: str | None = None
    """Environment variable that holds the key; empty: the server wants none."""


class Judge(Section):
    """Servers of the models that graders ask (`score_model`, `label_model`): any OpenAI-compatible one."""

    base_url: str = "https://api.openai.com/v1"
    """Server of the models that `models` does not name."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; empty: the server wants none."""

    timeout_s: float = Field(default=120.0, gt=0)
    """Longest time for one attempt."""

    retries: int = Field(default=5, ge=0)
    """Further attempts after 408, 409, 429, 5xx, a lost connection or half an answer, with growing pauses."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests a minute, all graders together."""

    cache: bool = True
    """Keep answers on disk (`~/.cache/graft/judges`), so that the same question is asked once."""

    models: dict[str, JudgeModel] = Field(default_factory=dict)
    """A grader's `model` -> where it is reached: a table of `base_url`, `model`, `api_key_env` for each."""


class PythonSandbox(Section):
    """Where `python` graders and code tests run, and what one call may use (`code_tests`: a call for each test)."""

    workers: int = Field(default=2, ge=1)
    """Calls that run side by side."""

    wall_s: float = Field(default=120.0, gt=0)
    """Longest time of a call, seconds."""

    cpu_s: int = Field(default=120, ge=1, le=10**9)
    """Processor time of each process of a call, seconds."""

    memory_mb: int = Field(default=2048, ge=1, le=10**9)
    """Memory that the processes of a call may add to the warm interpreter, all together, MiB."""

    disk_mb: int = Field(default=1024, ge=1, le=10**9)
    """Size of a call's own file system in memory (`/tmp`), and of its largest file, MiB."""

    processes: int = Field(default=32, ge=1, le=10**6)
    """Processes and threads of a call alive at once, the first one counted."""

    output_kb: int = Field(default=1024, ge=1, le=10**6)
    """What a call may write to standard output and standard error together, KiB."""

    unsafe: bool = False
    """Run the code without bubblewrap, with all rights of this process, where that cannot run."""


class Grading(Section):
    """How graders are run; what they are stands in `[grader]`."""

    failures: Literal["drop", "zero"] = "drop"
    """What becomes of a sample that could not be graded for a reason that is ours: it leaves its group (`drop`) or
    scores 0 as at OpenAI (`zero`). Either way it is counted."""

    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """The run stops when a larger share of a step's samples could not be graded for a reason that is ours."""

    concurrency: int = Field(default=16, ge=1)
    """Samples judged side by side where judges or endpoints are asked."""

    response_format: dict[str, Any] | None = None
    """Form of the completions as in chat completions (`{ type = "json_schema", json_schema = { ... } }`): fills
    `sample.output_json`. A row's own `response_format` comes first. Sampling is not constrained by it. Left out: that
    of the job's body which `grader.file` names, if it names one."""

    judge: Judge = Judge()
    sandbox: PythonSandbox = PythonSandbox()


class Sampling(Section):
    """The distribution that completions are drawn from. Default: the model's own, untruncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, in sampling and in every log-probability of training."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep the k most likely tokens. With this, `top_p` or `min_p`, training renormalises over the tokens that were
    kept when each token was drawn, so that the ratio compares like with like."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with at least this probability, of what `top_k` kept."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens with at least this share of the most likely token's probability, of what `top_p` kept."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion; one that reaches it is truncated."""


MomentDecay = Annotated[float, Field(ge=0, lt=1)]
"""Share of a moment that is left after a step."""


class Optimizer(Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it goes from the peak, after warm-up, to `final_fraction` of it at the last step."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from 0."""

    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak left at the last step (linear and cosine)."""

    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.999)
    """Decay of the first and second moment."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    max_gradient_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient's global norm to it; 0: no clipping."""


class Training(Section):
    """How much is trained, and in what pieces."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Rows for each optimiser step."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps (rollout batches) of the run. Give this, `epochs` or `generated_tokens`."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training rows."""

    generated_tokens: int | None = Field(default=None, ge=1)
    """Tokens to draw for training: the step that reaches them is the last. What falls over the run, like the learning
    rate, then follows the share that was drawn before the step."""

    microbatch_tokens: int = Field(default=1536, ge=1)
    """Tokens that go through the network at once; more is faster until the cache or memory is full."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if sum(length is not None for length in (self.steps, self.epochs, self.generated_tokens)) != 1:
            raise ValueError("give one of training.steps, training.epochs and training.generated_tokens")
        return self


class WarmStart(Section):
    """Supervised steps before the algorithm starts, on worked completions of training rows."""

    worked: str
    """As in `[algorithm] name = "sft"`."""

    steps: int = Field(ge=1)
    """Optimiser steps."""

    rows_per_step: int = Field(default=16, ge=1)
    """Worked completions for each step."""

    optimizer: Optimizer = Optimizer(learning_rate=2e-5)

    validate_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of the loss on held-out rows, which need worked completions, too. None: not
    measured."""

    early_stopping: EarlyStopping | None = None
    """Ends the warm start when the loss on held-out rows falls no longer."""

    @model_validator(mode="after")
    def _stops_for_a_loss(self) -> WarmStart:
        if self.early_stopping is not None and self.validate_every is None:
            raise ValueError("warm_start.early_stopping needs warm_start.validate_every, e.g. 5 (steps)")
        return self


class Evaluation(Section):
    """Measuring on held-out rows with the same engine and grader."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations. Without it the run is measured before and after training."""

    every_generated_tokens: int | None = Field(default=None, ge=1)
    """Tokens drawn for training between evaluations, instead of `every`: measured where a step reaches a multiple."""

    samples: int = Field(default=1, ge=1)
    """Completions for each held-out row; pass@k is reported for k up to it."""

    rows: int | None = Field(default=None, ge=1)
    """Held-out rows used during training (the first ones); before and after all are used."""

    temperature: float | None = Field(default=None, gt=0)
    """Temperature of evaluation; none: that of `[sampling]`."""

    threshold: float = 1.0
    """A score of at least this counts as solved. Left out: the grader's `pass_threshold`, if it has one."""

    @model_validator(mode="after")
    def _one_distance(self) -> Evaluation:
        if self.every is not None and self.every_generated_tokens is not None:
            raise ValueError("give either evaluation.every or evaluation.every_generated_tokens")
        return self


class Checkpoints(Section):
    """What is kept on disk to go on from."""

    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. One is written at the end, on Ctrl-C and after an error in any case, unless the run
    diverged or stood in the midst of several updates; without this there is no other, and a run that is killed starts
    anew."""

    keep_last: int = Field(default=1, ge=1)
    """Newest checkpoints kept."""

    keep_best: int = Field(default=0, ge=0)
    """Checkpoints kept for their held-out score, besides the newest."""


class Report(Section):
    """What is written for people."""

    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (extra `track`)."""

    trees: Literal["all", "none"] = "all"
    """Whether `trees.jsonl` gets every tree of training. With `sampling.top_k`, `top_p` or `min_p` it also holds the
    tokens that were kept at each place."""

    kl_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of KL to the initial model; keeps a copy of its weights in memory."""


class Rollout(Section):
    """The engine that samples."""

    engine: Literal["auto", "fast", "generic"] = "auto"
    """`fast`: packed weights and fused kernels (Llama family on a CPU); `generic`: any model; `auto`: fast if it
    can be."""

    slots: int = Field(default=64, ge=1)
    """Completions that grow side by side; finished ones leave and waiting ones enter."""


class RunConfig(Section):
    """All settings of a run."""

    run: str
    """Folder that the run writes: config, metrics, trees, checkpoints, report."""

    base: str = "."
    """Folder that file names in the settings start from. Default: the settings file's own folder."""

    seed: int = Field(default=0, ge=0)
    """Keys every random stream of the run."""

    model: Model
    data: Data
    grader: dict[str, Any] | None = None
    """What turns a completion into a reward: a grader object of OpenAI's (`type = "string_check"`, ...) or of graft's
    (`number`, `math`, `function`, ...), or `file = "grader.json"`, which may be the body of a fine-tuning job. See
    `docs/openai-rft.md`."""

    grading: Grading = Grading()
    algorithm: AlgorithmSettings = GRPO()
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    training: Training
    optimizer: Optimizer = Optimizer()
    warm_start: WarmStart | None = None
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    report: Report = Report()

    @model_validator(mode="before")
    @classmethod
    def _grader_speaks_for_silent_sections(cls, data: Any) -> Any:
        return with_what_the_grader_says(data) if isinstance(data, dict) else data

    @field_validator("grader", mode="before")
    @classmethod
    def _grader_is_one(cls, value: Any) -> Any:
        return None if value is None else check_section(value)

    @model_validator(mode="before")
    @classmethod
    def _grpo_unless_named(cls, data: Any) -> Any:
        algorithm = data.get("algorithm") if isinstance(data, dict) else None
        if isinstance(algorithm, dict) and "name" not in algorithm:
            return {**data, "algorithm": {"name": "grpo", **algorithm}}
        return data

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        if (self.data.source or "").startswith("gym:") and self.data.rows is None:
            raise ValueError(
                "data.rows: a 'gym:' source has no end; say how many rows to draw, e.g. rows = 2000"
            )
        if self.data.held_out and self.data.held_out_source:
            raise ValueError(
                "give either data.held_out (split off) or data.held_out_source (rows of their own)"
            )
        if isinstance(self.algorithm, SFT):
            self._refuse_what_needs_tokens(self.algorithm.name)
        self._refuse_what_cannot_be()
        return self

    def _refuse_what_needs_tokens(self, algorithm: str) -> None:
        if self.training.generated_tokens is not None:
            raise ValueError(
                f"training.generated_tokens: '{algorithm}' draws no tokens; give training.steps or epochs"
            )
        if self.evaluation.every_generated_tokens is not None:
            raise ValueError(
                f"evaluation.every_generated_tokens: '{algorithm}' draws no tokens; give evaluation.every (steps)"
            )
        if self.report.kl_every is not None:
            raise ValueError(
                f"report.kl_every: '{algorithm}' draws no tokens whose KL could be measured; leave it out"
            )

    def _refuse_what_cannot_be(self) -> None:
        self._refuse_stopping_without_a_loss()
        parts = getattr(self.algorithm, "minibatches", 1)
        if parts > self.training.prompts_per_step:
            raise ValueError(
                f"algorithm.minibatches = {parts}: a pass is cut between prompts, of which there are "
                f"training.prompts_per_step = {self.training.prompts_per_step}"
            )
        if isinstance(self.algorithm, OnTrees) and self.algorithm.open_paths > self.rollout.slots:
            raise ValueError(
                f"rollout.slots = {self.rollout.slots}: a tree of this shape keeps {self.algorithm.open_paths} "
                "paths of a prompt open; raise it, or lower algorithm.branching or algorithm.group_size"
            )
        if (
            isinstance(self.algorithm, Sampled)
            and self.algorithm.kl.anchor == "rollout"
            and self.report.kl_every is not None
        ):
            raise ValueError(
                "report.kl_every measures KL to the initial model, which is not kept with "
                'algorithm.kl.anchor = "rollout": leave one of them out'
            )

    def _refuse_stopping_without_a_loss(self) -> None:
        stops = isinstance(self.algorithm, SFT) and self.algorithm.early_stopping is not None
        if stops and self.evaluation.every is None:
            raise ValueError("algorithm.early_stopping needs evaluation.every, e.g. 10 (steps)")
        stops = stops or (self.warm_start is not None and self.warm_start.early_stopping is not None)
        if stops and not self.data.held_out and self.data.held_out_source is None:
            raise ValueError(
                "early_stopping needs held-out rows: give data.held_out (split off) or data.held_out_source"
            )

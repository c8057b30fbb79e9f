"""From settings to the parts of a run: rows, model, engine, grader. Knows every stage, decides nothing in the loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graft.algorithm_settings import SFT, AlgorithmSettings, OfThoughts, Sampled
from graft.config import Data, Model, Rollout, RunConfig, Sampling
from graft.critics.build import models_of
from graft.critics.build import refuse_rows as refuse_rows_for_critic
from graft.data.chat import ChatEncoder, prompts_from_rows
from graft.data.functions import load_function
from graft.data.rows import Row, read_rows
from graft.data.split import refuse_overlap, split_rows
from graft.errors import ConfigError, DataError, ModelError
from graft.graders import grader_of_function, grader_spec, judges_of, open_grader, refuse_rows
from graft.grading.build import BuiltGrader
from graft.held_out_loss import having_worked
from graft.kernels import load_kernels
from graft.kernels.accelerate import accelerate
from graft.kernels.products import training_kernels
from graft.memory import keep_freed_memory
from graft.model import AdapterSettings, Policy, load_model, sliding_window
from graft.named_functions import refuse_functions
from graft.objective.kl import EXACT
from graft.platform import read_cpu
from graft.rollout import llama_decoder
from graft.rollout.decoder import Decoder
from graft.rollout.hf_decoder import HuggingFaceDecoder
from graft.rollout.sampling import SamplingSettings
from graft.rollout.torch_engine import TorchEngine
from graft.score_notes import score_notes
from graft.thoughts import ThoughtCritic, open_thought_critic
from graft.types import Prompt
from graft.unreachable import unreachable_judges
from graft.update.policy import PolicyForward, Precision, check_packed_forward

Reward = Callable[..., Any]
"""`function(completion, item)` or `function(completion, item, sample)`; see `grading/function.py`."""


@dataclass(slots=True)
class Parts:
    """Everything that the loop works with."""

    config: RunConfig
    policy: Policy
    forward: PolicyForward
    engine: TorchEngine | None
    encoder: ChatEncoder
    grader: BuiltGrader | None
    critic: ThoughtCritic | None
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    device: torch.device
    fingerprint: Mapping[str, Any]
    """What decides the last bits: machine, libraries, threads, kernels."""

    notes: Sequence[str]
    """Decisions worth a line on the terminal, e.g. why the generic engine is used."""

    held: ExitStack
    """What grader and critic hold open."""

    def close(self) -> None:
        """Close what grader and critic hold open."""
        self.held.close()


def assemble(
    config: RunConfig,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    reward: Reward | None = None,
    progress: Callable[[str], None] | None = None,
) -> Parts:
    """Read rows, load the model and build engine and grader.

    Args:
        config: the settings.
        rows: rows in memory, instead of `data.source`.
        reward: a function in memory, instead of the `[grader]` section.
        progress: told of long steps, e.g. a model being fetched.

    Raises:
        GraftError: the kind says which part; see `errors.py`.
    """
    refuse_functions(config, reward=reward is not None)
    train_rows, held_out_rows = read_and_split(
        config.data, seed=config.seed, base=Path(config.base), rows=rows
    )
    if (asked := getattr(config.algorithm, "critic", None)) is not None:
        refuse_rows_for_critic(asked, train_rows)
    with ExitStack() as opened:
        grader = build_grader(config, [*train_rows, *held_out_rows], reward=reward)
        if grader is not None:
            opened.callback(grader.close)
        device = choose_device(config.model.device)
        if device.type == "cpu":
            keep_freed_memory()
        policy = load_policy(config.model, device, seed=config.seed, progress=progress)
        encoder = ChatEncoder(policy.tokenizer, config.model.chat_template_kwargs)
        limits = {
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "long_prompts": config.data.long_prompts,
        }
        train = prompts_from_rows(train_rows, encoder, **limits)
        held_out = prompts_from_rows(held_out_rows, encoder, **limits) if held_out_rows else []
        refuse_short_window(config, policy)
        check_packed_forward(PolicyForward(policy.plain, Precision("exact", device)))
        precision = choose_precision(config.model.precision, device)
        forward = build_forward(policy.plain, precision)
        notes = score_notes(config) if reward is None else []
        engine = None
        if grader is not None:
            engine, note = build_engine(config.rollout, policy, precision)
            notes += [note] if note else []
        critic = None
        if isinstance(config.algorithm, OfThoughts) and engine is not None and grader is not None:
            critic = open_thought_critic(
                config,
                config.algorithm,
                encoder,
                engine=engine,
                grader=grader,
                sampling=sampling_settings(config.sampling),
                device=str(device),
            )
            opened.callback(critic.close)
        notes += [*algorithm_notes(config.algorithm), *validation_notes(config, held_out)]
        if engine is not None:
            notes += unreachable_judges(config.grading.judge, _judges(config, reward))
        dropped = len(train_rows) + len(held_out_rows) - len(train) - len(held_out)
        if dropped:
            notes.append(
                f"{dropped} rows left out: longer than data.max_prompt_tokens = {config.data.max_prompt_tokens}"
            )
        return Parts(
            config=config,
            policy=policy,
            forward=forward,
            engine=engine,
            encoder=encoder,
            grader=grader,
            critic=critic,
            train=train,
            held_out=held_out,
            device=device,
            fingerprint=fingerprint(device, precision, engine),
            notes=notes,
            held=opened.pop_all(),
        )


def _judges(config: RunConfig, reward: Reward | None) -> list[str]:
    """The models that the grader and the critic ask."""
    base, critic = Path(config.base), getattr(config.algorithm, "critic", None)
    of_critic = [] if critic is None else models_of(critic)
    of_its_grader = judges_of(getattr(critic, "grader", None), base)
    return [*(judges_of(config.grader, base) if reward is None else []), *of_critic, *of_its_grader]


def algorithm_notes(settings: AlgorithmSettings) -> list[str]:
    """What the algorithm's settings leave untrained, where that may surprise."""
    if not isinstance(settings, Sampled):
        return []
    notes, kl = [], settings.kl
    if getattr(kl, "of", "policy") == "rollout" and kl.coefficient:
        notes.append("algorithm.kl.of = 'rollout': KL is reported (kl_to_initial) and trains nothing")
    value = getattr(settings, "value", None)
    if value is not None and value.warmup_steps:
        notes.append(
            f"algorithm.value.warmup_steps = {value.warmup_steps}: the first steps train the value model alone"
        )
    if kl.anchor == "rollout" and kl.in_loss and settings.updates == settings.refresh_every == 1:
        notes.append(
            "algorithm.kl.anchor = 'rollout' with one update a batch trains nothing: the policy has not left the "
            "anchor yet, and there the penalty's gradient is 0"
        )
    if kl.in_reward and kl.estimator == EXACT:
        notes.append(
            "algorithm.kl.estimator = 'exact' in the reward charges tokens for the states that they lead to, not for "
            "their own choice: 'k1' there has both parts, and 'exact' with kl.place = 'loss' the second"
        )
    return notes


def validation_notes(config: RunConfig, held_out: Sequence[Prompt]) -> list[str]:
    """Which held-out rows have no worked completion and so no part in the validation loss.

    Raises:
        ConfigError: training shall stop for a validation loss, and none has one.
    """
    notes, rows = [], held_out[: config.evaluation.rows]
    warm = config.warm_start if config.warm_start and config.warm_start.validate_every else None
    algorithm = config.algorithm if isinstance(config.algorithm, SFT) else None
    for section, settings in (("warm_start", warm), ("algorithm", algorithm)):
        if settings is None or not rows:
            continue
        have = len(having_worked(rows, settings.worked))
        if have < len(rows):
            lacks = f"{section}.worked = '{settings.worked}': {have} of {len(rows)} held-out rows have it"
            if not have and settings.early_stopping is not None:
                raise ConfigError(f"{lacks}, so there is no loss for {section}.early_stopping to watch")
            notes.append(f"{lacks}; the validation loss is that of these" if have else f"{lacks}; no loss")
    return notes


def refuse_short_window(config: RunConfig, policy: Policy) -> None:
    """Refuse a model whose layers see less than the longest path: packed rows and the engine show them everything.

    Raises:
        ModelError: names the window and the settings to lower.
    """
    window = sliding_window(policy.plain.config)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if window is not None and window < longest:
        raise ModelError(
            f"{config.model.name}: its layers see {window} tokens back, but a path may have {longest} "
            f"(data.max_prompt_tokens = {config.data.max_prompt_tokens}, sampling.max_new_tokens = "
            f"{config.sampling.max_new_tokens}). Lower these, or use a model with full attention."
        )


def read_and_split(
    data: Data, *, seed: int, base: Path, rows: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows that share no question.

    Raises:
        DataError: rows cannot be used, there are too few, or the two sources share questions.
    """

    def read(source: str | Sequence[Mapping[str, Any]], limit: int | None) -> list[Row]:
        return read_rows(
            source,
            options=data.options,
            limit=limit,
            seed=seed,
            prompt_key=data.prompt_key,
            system=data.system,
            suffix=data.suffix,
            base=base,
        )

    if rows is None and data.source is None:
        raise ConfigError(
            "data.source: missing. Name a file, 'gym:NAME' or 'hub:NAME', or pass rows from Python."
        )
    every = read(data.source if rows is None else rows, data.rows)  # pyright: ignore[reportArgumentType]
    if data.held_out_source is not None:
        held_out = read(data.held_out_source, None)
        refuse_overlap(every, held_out)
        return every, held_out
    return split_rows(every, data.held_out, seed=seed) if data.held_out else (every, [])


def build_grader(config: RunConfig, rows: Sequence[Row], *, reward: Reward | None) -> BuiltGrader | None:
    """The grader that the settings name, or one around a function in memory.

    Raises:
        GraftError: it cannot be built, or rows lack what it reads.
    """
    if reward is not None:
        return grader_of_function(reward, config.grading)
    if config.grader is None:
        return None
    spec = grader_spec(config.grader, Path(config.base))
    refuse_rows(spec, rows, config.grading.response_format)
    return open_grader(spec, config.grading, base=Path(config.base))


def load_policy(
    settings: Model, device: torch.device, *, seed: int, progress: Callable[[str], None] | None = None
) -> Policy:
    """The policy that the `[model]` section names, with its adapter if it has one.

    Raises:
        ModelError: as `model.load_model`.
    """
    adapter = settings.adapter
    return load_model(
        settings.name,
        device=device,
        adapter=None
        if adapter is None
        else AdapterSettings(adapter.rank, adapter.alpha, adapter.target_modules),
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=seed,
        progress=progress,
    )


def load_worked(reference: str, base: Path) -> Callable[[Mapping[str, Any]], str]:
    """What turns a row's item into its worked completion: `key:NAME`, or a function.

    Raises:
        ConfigError: no such function.
    """
    if reference.startswith("key:"):
        key = reference.removeprefix("key:")

        def from_key(item: Mapping[str, Any]) -> str:
            value = item.get(key)
            if not isinstance(value, str):
                raise DataError(f"item.{key} must be text, got {value!r}")
            return value

        return from_key
    return load_function(reference, base)


def frozen_copy(policy: Policy, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A plain model with these weights that never trains, on the policy's device."""
    plain = policy.plain
    with torch.device("meta"):
        model = type(plain)(copy.deepcopy(plain.config))
    model.load_state_dict(dict(weights), strict=True, assign=True)
    for name, buffer in plain.named_buffers():  # those that a state dict leaves out, e.g. rotary frequencies
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, buffer.clone(), persistent=False)
    model.tie_weights()
    return model.to(plain.device).requires_grad_(False).eval()


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': this torch sees no CUDA device. Use 'auto' or 'cpu'.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device = '{name}': want 'auto', 'cpu' or 'cuda'") from None


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` is `bf16` where bf16 products are faster than fp32 ones: on CUDA, on CPUs with AMX, on AMD's with
    AVX512-BF16 (Intel's without AMX multiply fp32 faster)."""
    native = device.type == "cpu" and not isinstance(training_kernels(), str)
    if name == "auto":
        cpu = read_cpu()
        torch_has_amx = cpu.amx_bf16 and not cpu.hides_amx_palette
        torch_is_fast = torch_has_amx or ("avx512_bf16" in cpu.flags and "AMD" in cpu.model_name)
        name = "bf16" if device.type == "cuda" or native or torch_is_fast else "exact"
    return Precision(name, device, native=native and name == "bf16")


def build_forward(model: PreTrainedModel, precision: Precision) -> PolicyForward:
    """A model on packed rows, its layers computed by the native kernels where these are faster."""
    if precision.native:
        accelerate(model)
    return PolicyForward(model, precision)


def build_engine(settings: Rollout, policy: Policy, precision: Precision) -> tuple[TorchEngine, str | None]:
    """The engine, and a note on why it is not the fast one when that was left open.

    Raises:
        ConfigError: `rollout.engine = "fast"` and it cannot be used here; says why.
    """
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    config, note = policy.plain.config, None
    decoder: Decoder | None = None
    if settings.engine != "generic":
        reason = "it is for CPUs" if precision.device.type != "cpu" else llama_decoder.supports(config)
        kernels = load_kernels() if reason is None else reason
        if isinstance(kernels, str):
            if settings.engine == "fast":
                raise ConfigError(
                    f"rollout.engine = 'fast' cannot be used: {kernels}. Use 'auto' or 'generic'."
                )
            note = f"generic engine: {kernels}"
        else:
            decoder = llama_decoder.LlamaDecoder(config, kernels, dtype)
    if decoder is None:
        native = load_kernels()
        kernels = None if isinstance(native, str) else native
        decoder = HuggingFaceDecoder(config, dtype=dtype, device=precision.device, kernels=kernels)
    return TorchEngine(decoder, slots=settings.slots, eos_ids=policy.eos_ids), note


def sampling_settings(sampling: Sampling, *, temperature: float | None = None) -> SamplingSettings:
    """The section as plain values."""
    return SamplingSettings(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature if temperature is None else temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def fingerprint(device: torch.device, precision: Precision, engine: TorchEngine | None) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else read_cpu().model_name
    return {
        "device": device.type,
        "device_name": name,
        "precision": precision.name + (" native" if precision.native else ""),
        "engine": None if engine is None else engine.path,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_cap": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    }

"""Names -> weights: loading a policy, its plain weights, and writing it out again.

resolve       embedded name, folder, .gguf file or hub id -> where the weights are
load_model    -> Policy: module, tokenizer, end-of-sequence ids
plain_state   the weights as a plain model has them, LoRA merged, for the sampling engine
export        a folder that transformers (or PEFT) loads
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from graft.data.chat import end_of_turn_id
from graft.errors import ModelError
from graft.gguf_model import load_gguf, load_gguf_tokenizer, no_progress_bars, plain_model
from graft.pull import EMBEDDED, Progress, default_cache, list_models, nearest_embedded, pull

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "EMBEDDED",
    "AdapterSettings",
    "Policy",
    "default_cache",
    "export",
    "list_models",
    "load_model",
    "plain_state",
    "pull",
    "resolve",
    "sliding_window",
    "trainable",
]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

CLASSIFIERS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice")
"""Architectures whose weights load into a causal language model, without being one."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

OTHER_HEADS = ("classifier", "summary")
"""Beginnings of config fields about heads that a causal language model does not have."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """LoRA. Its dropout is always 0: it would make the trainer's probabilities differ from the sampler's."""

    rank: int = 16
    alpha: float = 32.0
    """Scale of the update: `alpha / rank` multiplies it."""

    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, e.g. `("q_proj", "v_proj")`. Empty: all but the LM
    head."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model ready to be sampled from and trained."""

    model: Any
    """The module: transformers' model, or PEFT's wrapper around it where there is an adapter. In training
    mode, which gradient checkpointing needs; without dropout it computes the same in both modes."""

    tokenizer: Any

    eos_ids: tuple[int, ...]
    """Every token that ends a completion, ascending: those of the config, the generation config, the
    tokenizer, and the one with which the chat template ends an assistant's turn."""

    pad_id: int
    """Fills unused positions; may equal an end-of-sequence id."""

    name: str
    """As the caller named it."""

    adapter: AdapterSettings | None

    @property
    def plain(self) -> Any:
        """Transformers' own module, inside the adapter's wrapper if there is one."""
        return self.model if self.adapter is None else self.model.get_base_model()


def resolve(name: str, cache: Path, progress: Progress | None = None) -> Path | str:
    """Find what a model name stands for.

    In this order: an embedded name (pulled if it is not in the cache yet), a local folder, a local `.gguf`
    file, a hub id `ORGANISATION/NAME` (returned as it is; transformers fetches it on loading).

    Raises:
        ModelError: nothing of that name, or a folder or file of another kind; or as `pull`.
    """
    if name in EMBEDDED:
        return pull(name, cache, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{path} holds a PEFT adapter without its base model. Merge it (`graft model export` with "
                "merged weights does) and name the merged folder."
            )
        raise ModelError(f"{path} is no model folder: it has no config.json. Name the folder that has one.")
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{path} is a file of kind {path.suffix!r}; wanted a model folder or a .gguf file.")
    looks_local = name.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if HUB_ID.fullmatch(name) and not looks_local:
        return name
    what = (
        f"there is no such {'file' if path.suffix == '.gguf' else 'folder'}"
        if looks_local
        else "unknown model"
    )
    raise ModelError(
        f"model {name!r}: {what}; {nearest_embedded(name)}. "
        "Give an embedded name, a model folder, a .gguf file or a hub id ORGANISATION/NAME."
    )


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    adapter: AdapterSettings | None = None,
    gradient_checkpointing: bool = False,
    attention: str = "eager",
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Policy:
    """Load a policy.

    Args:
        name: as `resolve` takes it.
        dtype: of the weights. An adapter's own weights are fp32 whatever it says.
        device: where the weights go, e.g. `"cuda"`.
        adapter: train a LoRA adapter and freeze the rest; None: all weights train.
        gradient_checkpointing: recompute activations in the backward pass.
        attention: `"eager"`, `"sdpa"` or a name registered with transformers' AttentionInterface.
        cache: for embedded models; default `default_cache()`.
        seed: of the adapter's first weights.
        progress: told of long steps.

    Raises:
        ModelError: the model is missing or damaged, is not a causal language model, uses dropout, does not
            fit its tokenizer, has no end-of-sequence token, or the adapter's target modules do not occur in
            it.
    """
    location = resolve(name, cache or default_cache(), progress)
    model, tokenizer = _read(name, location, dtype)
    refuse_dropout(name, model)
    _refuse_misfit(name, model, tokenizer)
    eos_ids = find_eos_ids(model, tokenizer)
    if not eos_ids:
        raise ModelError(
            f"{name}: neither config, generation config, tokenizer nor chat template names an "
            "end-of-sequence token, so no completion would ever end. Set eos_token_id in its "
            "generation_config.json."
        )
    _refuse_if_tokens_see_their_future(name, model)
    _set_attention(name, model, attention)
    plain = model
    if adapter is not None:
        model = _with_adapter(name, model, adapter, seed)
    if gradient_checkpointing:
        _enable_checkpointing(plain)
    model.to(device)
    model.train()
    pad_ids = (tokenizer.pad_token_id, _text_config(model.config).pad_token_id, eos_ids[0])
    pad_id = next(token for token in pad_ids if token is not None)
    return Policy(model, tokenizer, eos_ids, pad_id, name, adapter)


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser shall change, by name, in the model's order; shared ones once."""
    return {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def plain_state(policy: Policy) -> dict[str, Tensor]:
    """The state dict of the plain model, with LoRA merged into it as PEFT would. The policy is left as it is.

    Tensors that no adapter changes share memory with the policy: copy them before they are changed.
    """
    state = policy.plain.state_dict()
    if policy.adapter is None:
        return state
    from peft.tuners.lora import LoraLayer

    merged = {}
    layers: dict[str, Any] = {
        name: module for name, module in policy.plain.named_modules() if isinstance(module, LoraLayer)
    }
    for key, tensor in state.items():
        owner, _, rest = key.rpartition(".base_layer.")
        if owner in layers:
            if rest == "weight":
                for active in layers[owner].active_adapters:
                    tensor = (tensor + layers[owner].get_delta_weight(active)).to(tensor.dtype)
            merged[f"{owner}.{rest}"] = tensor
        elif key.partition(".lora_")[0] not in layers:
            merged[key] = tensor
    return merged


def export(policy: Policy, folder: Path, merged: bool = True) -> None:
    """Write the policy out; the folder appears complete or not at all.

    Args:
        policy: what to write.
        folder: must not exist yet, or be empty.
        merged: a plain model folder for transformers' `from_pretrained`; False: the adapter alone, for PEFT.

    Raises:
        ModelError: the folder holds something already, or an adapter is asked for and there is none.
    """
    if not merged and policy.adapter is None:
        raise ModelError(f"{policy.name} was trained without an adapter: export it with merged = true.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists already and is not empty; choose another folder or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / folder.name
        with no_progress_bars():
            if merged:
                plain = policy.plain
                plain_model(plain.config, plain.generation_config, plain_state(policy)).save_pretrained(
                    written
                )
            else:
                policy.model.save_pretrained(str(written), save_embedding_layers=False)
            policy.tokenizer.save_pretrained(written)
        if folder.exists():
            folder.rmdir()
        shutil.move(written, folder)


def sliding_window(config: Any) -> int | None:
    """How many positions back some layer can see, in tokens; None: every layer sees everything before it.

    Args:
        config: a transformers config.
    """
    text = _text_config(config)
    layers = set(getattr(text, "layer_types", None) or ()) | set(
        getattr(text, "attention_layers", None) or ()
    )
    if "sliding_attention" in layers:
        return text.sliding_window
    if "chunked_attention" in layers:
        return text.attention_chunk_size
    if "local" in layers:
        return text.window_size
    if layers or getattr(text, "use_sliding_window", None) is False:
        return None
    return getattr(text, "sliding_window", None)


def find_eos_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """All tokens that may end a completion, ascending; see `Policy.eos_ids`."""
    sources = [_text_config(model.config).eos_token_id, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    if model.generation_config is not None:
        sources.append(model.generation_config.eos_token_id)
    found: set[int] = set()
    for source in sources:
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    return tuple(sorted(found))


def refuse_dropout(name: str, model: nn.Module) -> None:
    """Refuse a model that would drop or disturb activations while it trains.

    Raises:
        ModelError: names the config fields or modules.
    """
    config = getattr(model, "config", None)
    fields = _text_config(config).to_dict() if config is not None else {}
    found = [
        f"config.{key} = {value}"
        for key, value in fields.items()
        if any(word in key for word in ("drop", "jitter"))
        and not key.startswith(OTHER_HEADS)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    ]
    if not found:
        found = [
            f"module {path} has p = {module.p}"
            for path, module in model.named_modules()
            if isinstance(module, DROPOUTS) and module.p > 0 and not path.startswith(OTHER_HEADS)
        ]
    if found:
        raise ModelError(
            f"{name} uses dropout or noise: {', '.join(found[:4])}. The ratio of new to old probabilities "
            "would then measure the noise. Set it to 0 in a copy of the model's config.json."
        )


def _read(name: str, location: Path | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model (eager attention, CPU) and tokenizer, with whatever transformers raises turned into a
    ModelError."""
    if isinstance(location, Path) and location.suffix == ".gguf":
        return load_gguf(location, dtype=dtype), load_gguf_tokenizer(location)
    try:
        config = AutoConfig.from_pretrained(location)
        _refuse_other_kinds(name, config)
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
            )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(location)
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        where = "that folder" if isinstance(location, Path) else "the hub (and no local folder has that name)"
        raise ModelError(
            f"model {name!r} cannot be loaded from {where}: {type(error).__name__}: {error}. It needs "
            "config.json, complete weights and tokenizer files of a causal language model."
        ) from error
    _refuse_partial_weights(name, model, set(report["missing_keys"]), set(report["unexpected_keys"]))
    return model, tokenizer


def _refuse_other_kinds(name: str, config: Any) -> None:
    kind = (config.architectures or [config.model_type])[0]
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not known or CLASSIFIERS.search(kind):
        raise ModelError(
            f"{name} is a {kind}, not a causal language model that transformers knows; use one that is."
        )


def _refuse_partial_weights(
    name: str, model: PreTrainedModel, missing: set[str], unexpected: set[str]
) -> None:
    """Weights that were made up because the files lack them, or left out because the config has fewer
    layers."""
    if missing:
        raise ModelError(
            f"{name}: its files lack {len(missing)} of the weights that a causal language model needs, e.g. "
            f"{min(missing)!r}. The folder is incomplete or holds a model with another head."
        )
    kinds = {re.sub(r"\d+", "N", key) for key in model.state_dict()}
    left_out = [key for key in unexpected if re.sub(r"\d+", "N", key) in kinds]
    if left_out:
        raise ModelError(
            f"{name}: its files hold {len(left_out)} weights for which config.json has no layer, e.g. "
            f"{min(left_out)!r}. Use the config.json that belongs to the weights."
        )


def _set_attention(name: str, model: PreTrainedModel, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"{name}: attention {attention!r} cannot be used: {error}. Use 'eager' or 'sdpa'."
        ) from error


def _refuse_misfit(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    rows = _embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"{name}: its tokenizer has ids up to {highest}, its embedding only {rows} rows. "
            "Tokenizer and model do not belong together; use the tokenizer files that came with the weights."
        )


@torch.no_grad()
def _refuse_if_tokens_see_their_future(name: str, model: PreTrainedModel) -> None:
    """Change the last of a few tokens: earlier logits must stay. BERT-like models load as causal ones and are
    not."""
    rows = _embedding_rows(model)
    tokens = torch.arange(8).remainder(rows)[None]
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + rows // 2) % rows
    model.eval()
    before, after = (
        model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (tokens, changed)
    )
    # Rounding may differ where experts are batched by their tokens; a model that looks ahead differs far
    # more.
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    if (before - after).abs().max() > tolerance * before.abs().max():
        raise ModelError(
            f"{name}: its tokens see later tokens, so it is no causal language model; use one that is."
        )


def _with_adapter(name: str, model: PreTrainedModel, adapter: AdapterSettings, seed: int) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType] (annotated int, used as a factor)
        target_modules=list(adapter.target_modules) or "all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # PEFT's call
        warnings.filterwarnings("ignore", ".*tied layer is part of the adapter", UserWarning)  # refused below
        try:
            wrapped = get_peft_model(model, settings)
        except ValueError as error:
            linear = {
                path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, nn.Linear)
            }
            raise ModelError(
                f"{name}: cannot put an adapter on {adapter.target_modules or 'all linear layers'} with rank "
                f"{adapter.rank}: {error}. Its linear layers: {', '.join(sorted(linear))}."
            ) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if _text_config(model.config).tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        raise ModelError(
            f"{name} uses one matrix as embedding and LM head, so an adapter on either alone could not be "
            "merged. Leave both out of target_modules."
        )
    return wrapped  # pyright: ignore[reportReturnType]


def _enable_checkpointing(model: Any) -> None:
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:  # its name in older versions of transformers
        model.gradient_checkpointing_enable(settings)


def _embedding_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)

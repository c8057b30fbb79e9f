"""What the torch engine asks of a model: prefixes once, then one token a row.

Two implementations stand behind this protocol: `hf_decoder.py` (any Hugging Face causal model) and
`llama_decoder.py` (the Llama family on a CPU, packed weights and fused kernels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from graft.rollout.sampling import Drawn, SamplingSettings
from graft.types import Tokens


class Decoder(Protocol):
    """Holds a copy of the policy's weights and the key/value cache."""

    name: str
    """Path in use, for the log and the checkpoint: `generic`, `fast`, ..."""

    width_invariant: bool
    """Whether a row's logits are the same to the bit whatever other rows share the batch."""

    def load_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the plain model's state dict, cast to the engine's dtype. Drops all caches."""
        ...

    def drop_weights(self) -> None:
        """Give back the memory of weights and caches until `load_weights` is called again."""
        ...

    def begin(self, prefixes: Sequence[Tokens], slots: int, max_new_tokens: int) -> torch.Tensor:
        """Compute every prefix once and keep its keys and values; make room for `slots` growing rows.

        Returns the logits after the last token of each prefix, fp32 `[len(prefixes), vocabulary]`.
        """
        ...

    def step(
        self,
        slots: np.ndarray,  # int32 [rows]: which slot of the cache each row writes to, all different
        prefixes: np.ndarray,  # int32 [rows]: index into begin()'s prefixes
        tokens: np.ndarray,  # int32 [rows]: the token to append to each row
        lengths: np.ndarray,  # int32 [rows]: tokens already in the row's slot (0 right after the prefix)
    ) -> torch.Tensor:
        """Append one token to each row and return fp32 logits `[rows, vocabulary]` for the next.

        Row r attends to its prefix and to slot positions 0..lengths[r]; the appended token's position
        is prefix length + lengths[r]. Starting a slot again at length 0 reuses it for a new row. Slots that take
        no step keep what they hold until they are released.
        """
        ...

    def release(self, slot: int) -> None:
        """Nothing goes on from this slot any more; a new row or a copy may enter it."""
        ...

    def copy_slots(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Let slots go on from where others stand.

        Args:
            sources: int32 `[copies]`, slots that have taken a step; all are read before the first is written.
            targets: int32 `[copies]`, slots of no growing row, all different.
        """
        ...

    def draw(self, logits: torch.Tensor, uniform: np.ndarray, sampling: SamplingSettings) -> Drawn:
        """Draw one token a row as `sampling.draw` does; rows without a finite maximum get the log-probability NaN.

        Args:
            logits: fp32 `[rows, vocabulary]`.
            uniform: float64 `[rows]` in [0, 1).
            sampling: temperature and truncation.
        """
        ...

    def end(self) -> None:
        """Drop the caches of this round."""
        ...

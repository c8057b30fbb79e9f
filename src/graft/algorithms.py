"""The table of algorithms. A row says how credit is given and which loss it enters; the loop knows no names.

Rows take records and give records (`credit`, in `crediting.py`), or tensors and give tensors (`loss`, in `losses.py`);
both are made of the pure functions in `credit/` and `objective/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.crediting import (
    Evidence,
    StepCredit,
    credit_centred,
    credit_leave_one_out,
    credit_relative,
    credit_running_mean,
    credit_values,
    credit_worked,
)
from graft.crediting_rollouts import credit_nodes, credit_steps
from graft.crediting_segments import credit_process, credit_segments
from graft.crediting_trees import credit_siblings
from graft.losses import (
    TokenBatch,
    TokenLoss,
    loss_clipped,
    loss_clipped_sequence,
    loss_cross_entropy,
    loss_nodes,
    loss_reinforce,
    loss_segments,
    loss_weighted,
)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table. `settings` is the algorithm's section of the configuration."""

    samples: bool
    """Whether the engine draws completions and a grader scores them; otherwise rows bring worked completions."""

    credit: Callable[[Evidence, Any], StepCredit]
    loss: Callable[[TokenBatch, Any], TokenLoss]


ALGORITHMS: Mapping[str, Algorithm] = {
    "reinforce": Algorithm(samples=True, credit=credit_running_mean, loss=loss_reinforce),
    "rloo": Algorithm(samples=True, credit=credit_leave_one_out, loss=loss_clipped),
    "grpo": Algorithm(samples=True, credit=credit_relative, loss=loss_clipped),
    "dr_grpo": Algorithm(samples=True, credit=credit_centred, loss=loss_clipped),
    "dapo": Algorithm(samples=True, credit=credit_relative, loss=loss_clipped),
    "gspo": Algorithm(samples=True, credit=credit_relative, loss=loss_clipped_sequence),
    "cispo": Algorithm(samples=True, credit=credit_relative, loss=loss_weighted),
    "ppo": Algorithm(samples=True, credit=credit_values, loss=loss_clipped),
    "process_grpo": Algorithm(samples=True, credit=credit_process, loss=loss_clipped),
    "rft": Algorithm(samples=True, credit=credit_segments, loss=loss_segments),
    "grft": Algorithm(samples=True, credit=credit_siblings, loss=loss_nodes),
    "vineppo": Algorithm(samples=True, credit=credit_steps, loss=loss_clipped),
    "spo_chain": Algorithm(samples=True, credit=credit_steps, loss=loss_clipped),
    "spo_tree": Algorithm(samples=True, credit=credit_nodes, loss=loss_clipped),
    "sft": Algorithm(samples=False, credit=credit_worked, loss=loss_cross_entropy),
}

"""The value model: a scalar head on the policy's last layer, or on a trunk of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueModel(nn.Module):
    """V(s) for the state before each trained token. The head starts at zero: no advantage is made up by it."""

    def __init__(
        self, width: int, *, trunk: nn.Module | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            width: of the last layer's hidden states.
            trunk: a transformer body that trains with the head; None: the head reads the policy's hidden states.
            dtype: of the head, that of the policy's weights.
            device: of the head.
        """
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, dtype=dtype, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[U, width]` -> `[U]`, in the head's own type whatever the trunk's products are computed in."""
        return self.head(hidden.to(self.head.weight.dtype))[:, 0]

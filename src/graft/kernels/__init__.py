"""Native CPU kernels: packed matrix products, decoding kernels, a bf16 linear layer for training."""

from graft.kernels.library import Engine, Kernels, load_kernels

__all__ = ["Engine", "Kernels", "load_kernels"]

"""graft: reinforcement fine-tuning with credit for every step of the reasoning."""

from graft.platform import guard_onednn, limit_openmp_spinning

# Both must run before torch is imported or computes; see the functions for what they protect from.
guard_onednn()
limit_openmp_spinning()

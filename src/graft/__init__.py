"""graft: reinforcement fine-tuning with credit for every step of the reasoning."""

from graft.platform import guard_onednn

# Must run before torch executes its first bf16 product; see the function for the CPUs it protects from.
guard_onednn()

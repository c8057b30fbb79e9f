"""Errors that a caller would want to catch.

    GraftError
    ├── ConfigError        a setting is unknown, malformed or means nothing here
    ├── DataError          a row, prompt or chat template cannot be used
    ├── ModelError         a model is missing, damaged or of a kind that is not supported
    ├── GraderError        a reward function or grader failed in a way that is not the model's fault
    ├── CheckpointError    a checkpoint is missing, incomplete or does not fit this run
    ├── ResourceError      memory or disk ran out, or a file of the run could not be written
    └── DivergenceError    a loss, gradient or log-probability is not a finite number

Every message says where, what it got, what it wants and what to do.
"""


class GraftError(Exception):
    """Base of all errors raised on purpose by graft. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(GraftError):
    """A setting is unknown, malformed or means nothing to the chosen algorithm."""

    exit_code = 2


class DataError(GraftError):
    """A row, a prompt or a chat template cannot be used."""

    exit_code = 3


class ModelError(GraftError):
    """A model is missing, damaged or of a kind that is not supported."""

    exit_code = 4


class GraderError(GraftError):
    """A reward function or grader failed in a way that is not the model's fault."""

    exit_code = 5


class CheckpointError(GraftError):
    """A checkpoint is missing, incomplete or does not fit this run."""

    exit_code = 6


class ResourceError(GraftError):
    """Memory or disk ran out, or a file of the run could not be written."""

    exit_code = 7


class DivergenceError(GraftError):
    """A loss, gradient or log-probability is not a finite number. The weights were not moved any further."""

    exit_code = 8

    def __init__(self, found: str) -> None:
        """
        Args:
            found: where, and which number; what to try is added.
        """
        super().__init__(
            f"{found}. In the run's config.toml try a lower learning rate (optimizer.learning_rate, or "
            "warm_start.optimizer.learning_rate), optimizer.warmup_steps, a smaller optimizer.max_gradient_norm, or "
            "model.precision = 'exact'; then `graft resume` goes on from the newest checkpoint, or from the start "
            "where there is none. Unchanged, it comes to the same place again."
        )

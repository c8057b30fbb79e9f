"""graft: reinforcement fine-tuning with credit for every step of the reasoning."""

from typing import TYPE_CHECKING, Any

from graft.platform import guard_onednn, limit_openmp_spinning

# Both must run before torch is imported or computes; see the functions for what they protect from.
guard_onednn()
limit_openmp_spinning()

if TYPE_CHECKING:
    from graft.api import evaluate, resume, train
    from graft.errors import GraftError
    from graft.interrupt import Interrupted

    __version__: str

__all__ = ["GraftError", "Interrupted", "__version__", "evaluate", "resume", "train"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for, so that `import graft` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'graft' has no attribute '{name}'; it has {', '.join(__all__)}")
    from graft import api, errors, interrupt, version

    values = {
        "GraftError": errors.GraftError,
        "Interrupted": interrupt.Interrupted,
        "__version__": version.VERSION,
        "evaluate": api.evaluate,
        "resume": api.resume,
        "train": api.train,
    }
    globals().update(values)
    return values[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Every error that LayerRoute raises on purpose.

All of them derive from `LayerRouteError`, and those that are failures also from the builtin a caller would expect, so
both `except LayerRouteError` and `except ValueError` work. A message names the field, the value and what would work.

    LayerRouteError
    ├── ConfigError        (ValueError)    a setting, a recipe key, a command-line value
    ├── DataError          (ValueError)    a data file, a row, a tool schema
    ├── BackboneError      (ValueError)    a backbone that cannot be loaded or routed
    │   └── AssetError     (OSError)       a download that is missing, truncated or corrupt
    ├── AdapterError       (ValueError)    an adapter folder that is incomplete, damaged or for another backbone
    ├── GenerationError    (ValueError)    a generation request that routing cannot serve
    ├── TrainingError      (RuntimeError)  a training run that cannot go on
    │   └── TrainingInterrupted            Ctrl-C or SIGTERM; a checkpoint was left; an `Interrupted`, too
    └── Interrupted                        Ctrl-C; what was done so far was kept
"""

__all__ = [
    "AdapterError",
    "AssetError",
    "BackboneError",
    "ConfigError",
    "DataError",
    "GenerationError",
    "Interrupted",
    "LayerRouteError",
    "TrainingError",
    "TrainingInterrupted",
]


class LayerRouteError(Exception):
    """Base of all errors raised on purpose; the command line prints its message in one line."""


class ConfigError(LayerRouteError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(LayerRouteError, ValueError):
    """A data file or row cannot be used; the message names file and line."""


class BackboneError(LayerRouteError, ValueError):
    """A backbone cannot be found, loaded, or has no structure that can be routed."""


class AssetError(BackboneError, OSError):
    """A built-in asset could not be fetched or failed its checksum."""


class AdapterError(LayerRouteError, ValueError):
    """An adapter folder is incomplete, damaged, of an unknown format, or belongs to another backbone."""


class GenerationError(LayerRouteError, ValueError):
    """A generation request that routing cannot serve (beam search, a prompt longer than the context, ...)."""


class TrainingError(LayerRouteError, RuntimeError):
    """A training run cannot start or continue."""


class Interrupted(LayerRouteError):
    """The user ended it; the message says how to go on. The command line exits with status 130."""


class TrainingInterrupted(TrainingError, Interrupted):
    """A signal ended the run; the message says where its checkpoint is and how to go on."""

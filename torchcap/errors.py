"""The exceptions that torchcap raises; each is also the builtin that a user would catch.

TorchcapError
├── TraceError (RuntimeError)             the model cannot be read
├── ExampleInputsError (ValueError)       the example inputs do not fit the model
├── ModelError (ValueError)               the model cannot be prepared as it is
│   └── NothingToCompressError            no channel space is free
├── PlanError (ValueError)                ratio, rank or space that the model cannot take
├── DataError (ValueError)                calibration data that cannot be used
├── StudentError (RuntimeError)           not a prepared model, or not in the state needed
├── RecipeError (ValueError)              a recipe whose values are out of range
├── TrainingError (RuntimeError)          a loss that is not finite
├── StateError (OSError)                  a saved state that cannot be written, read or continued
├── FileError (OSError)                   a saved model that cannot be written, read or applied
└── MissingPackageError (ImportError)     an optional package that a call needs
"""

from __future__ import annotations


class TorchcapError(Exception):
    """Base of every error that torchcap raises on purpose."""


class TraceError(TorchcapError, RuntimeError):
    """The model cannot be read: its forward cannot be traced."""


class ExampleInputsError(TorchcapError, ValueError):
    """The example inputs do not fit the model, or are needed and missing."""


class ModelError(TorchcapError, ValueError):
    """The model cannot be prepared as it is."""


class NothingToCompressError(ModelError):
    """No channel space of the model is free; the message lists the reasons."""


class PlanError(TorchcapError, ValueError):
    """A ratio, rank or space name that the model cannot take."""


class DataError(TorchcapError, ValueError):
    """Calibration data that cannot be used."""


class StudentError(TorchcapError, RuntimeError):
    """The model is not a prepared one, or not in the state that the call needs."""


class RecipeError(TorchcapError, ValueError):
    """A recipe whose values are out of range."""


class TrainingError(TorchcapError, RuntimeError):
    """Training cannot go on: its loss is not finite. The last good weights are kept."""


class StateError(TorchcapError, OSError):
    """A saved state that cannot be written or read, or belongs to another run."""


class FileError(TorchcapError, OSError):
    """A file that cannot be written or read, or that does not fit the model given."""


class MissingPackageError(TorchcapError, ImportError):
    """A call needs an optional package that is not installed; the message says how to get it."""

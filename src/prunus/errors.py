"""Everything prunus raises on purpose.

Every message says what was wrong, with which value, and what to do about it. Options stand in backticks, by their names
in Python (`seq_len`); the command line shows their flags instead (--seq-len).

PrunusError
 ├─ OptionError            an option or argument has a value that cannot work
 ├─ UnsupportedModelError  the model is of a family, or in a state, that prunus does not cut
 ├─ CalibrationError       the calibration text is missing, unreadable or too short
 │   └─ TextTooShortError  the text holds fewer tokens than asked for
 ├─ NonFiniteError         NaN or infinity in weights, statistics or loss
 ├─ StatisticsError        statistics are missing, or were made from other inputs
 ├─ BudgetError            the asked ratio cannot be reached under the given constraints
 ├─ PlanError              a plan, table or profile file is malformed, or does not fit the model
 ├─ CheckpointError        a model folder is incomplete, damaged or cannot be written
 └─ BusyError              another run is writing the same output or work folder
"""

__all__ = [
    "BudgetError",
    "BusyError",
    "CalibrationError",
    "CheckpointError",
    "NonFiniteError",
    "OptionError",
    "PlanError",
    "PrunusError",
    "StatisticsError",
    "TextTooShortError",
    "UnsupportedModelError",
]


class PrunusError(Exception):
    """Base of every error that prunus raises on purpose."""


class OptionError(PrunusError, ValueError):
    """An option or argument has a value that cannot work."""


class UnsupportedModelError(PrunusError):
    """The model is of a family, or in a state, that prunus does not cut."""


class CalibrationError(PrunusError):
    """The calibration text is missing, unreadable or too short."""


class TextTooShortError(CalibrationError):
    """The text holds fewer tokens than asked for.

    Attributes:
        sequences: how many of the sequences asked for it has.
    """

    def __init__(self, message: str, sequences: int = 0):
        super().__init__(message)
        self.sequences = sequences


class NonFiniteError(PrunusError):
    """NaN or infinity in weights, statistics or loss."""


class StatisticsError(PrunusError):
    """Statistics are missing, or were made from other inputs."""


class BudgetError(PrunusError):
    """The asked ratio cannot be reached under the given constraints."""


class PlanError(PrunusError):
    """A plan, table or profile file is malformed, or does not fit the model."""


class CheckpointError(PrunusError):
    """A model folder is incomplete, damaged or cannot be written."""


class BusyError(PrunusError):
    """Another run is writing the same output or work folder."""

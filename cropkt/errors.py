"""Every error cropkt raises on purpose.

    CropktError                      exit code 1
    ├── UsageError                   64  the command line asks for something that cannot be
    ├── DataError                    65  a file or a cohort is not what it must be
    │   ├── OutcomeTableError            a row or column of an outcome table
    │   ├── SlideFileError               a slide file cannot be read, or holds no bag of patches
    │   ├── BagShapeError                features of the wrong width
    │   ├── MissingSlideError            a slide named by the table lies nowhere
    │   ├── CohortError                  patients that contradict each other
    │   └── NotEstimableError            a quantity these patients cannot determine
    ├── ArtifactError                65  an expert or router file is not what it says it is
    │   ├── FileFormatError              not a safetensors file, or a damaged one
    │   ├── PickledError                 a pickle, which is never read
    │   ├── TooLargeError                larger than the limit
    │   ├── CardError                    its card is not in the agreed form
    │   ├── CardChangedError             its card is not what was signed
    │   ├── UnknownSignerError           it is not signed by whom its card names
    │   ├── MissingTensorError           a tensor that its card promises is not there
    │   ├── ExtraTensorError             a tensor that its card does not know
    │   ├── TensorShapeError             a tensor has another shape
    │   ├── TensorTypeError              a tensor has another dtype
    │   ├── NotFiniteError               NaN or an infinity among its weights
    │   ├── WeightsChangedError          its weights are not those that were signed
    │   ├── OtherExpertError             it is an expert, but not the one asked for
    │   ├── EncoderMismatchError         trained on another encoder's features
    │   ├── BinsMismatchError            trained for other time bins
    │   ├── StartMismatchError           trained from another M0
    │   ├── StudyMismatchError           trained under other settings of the study
    │   └── RevokedExpertError           the coordinator took it back
    ├── MessageError                 76  a message that is not in the contract
    ├── VersionMismatchError         76  the two sides run versions that do not go together
    ├── RefusedError                 77  one side does not trust the other, or says no
    │   ├── RevokedSiteError             the coordinator cut the site off, or withdrew its invite
    │   └── BudgetError                  a cohort's privacy budget does not allow it
    ├── EnrolmentRefusedError        77  why, said by the coordinator (cropkt_server.roster)
    ├── UnavailableError             69  the coordinator cannot be reached, for now
    ├── DiskFullError                74  a disk takes no more
    ├── TrainingFailedError          70  training diverged or its process died
    ├── ConfigError                  78  a value in study.yaml, site.yaml or a preset
    └── StudyError                   1   the study finished with failed or missing rows: 3

An error says what is wrong, where, and what to do about it, and names files, rows or counts of
patients, never a patient.
"""

from __future__ import annotations

from pathlib import Path


class CropktError(Exception):
    """Base of all deliberate errors; `exit_code` is what a command returns for it."""

    exit_code = 1

    def __init__(self, where: str | Path, problem: str, fix: str = "") -> None:
        # All arguments go on to Exception: process pools and Ray pickle an error by its args.
        super().__init__(where, problem, fix)
        self.where = str(where)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}." if self.where else f"{self.problem}."
        return f"{text} {self.fix}." if self.fix else text


class UsageError(CropktError):
    """The command line asks for something that cannot be."""

    exit_code = 64


class DataError(CropktError, ValueError):
    """A file or a cohort is not what it must be."""

    exit_code = 65


class OutcomeTableError(DataError):
    """A row or column of an outcome table is wrong."""


class SlideFileError(DataError):
    """A slide file cannot be read, or holds no bag of patches."""


class BagShapeError(DataError):
    """A slide's features lack the width that its encoder promises."""


class SlideMismatchError(DataError):
    """A slide was read by another encoder, or otherwise, than the slides a model learnt from."""


class MissingSlideError(DataError):
    """A slide that the outcome table names lies under none of the given folders."""


class CohortError(DataError):
    """Patients contradict each other, or too few are left."""


class NotEstimableError(DataError):
    """These patients cannot determine the quantity, for example no pair is comparable."""


class ArtifactError(DataError):
    """An expert or router file is not what it says it is."""


class FileFormatError(ArtifactError):
    """The file is no safetensors file, or it is damaged."""


class PickledError(ArtifactError):
    """The file is a pickle, as torch.save writes them: reading it could run code."""


class TooLargeError(ArtifactError):
    """The file, or what it declares, is larger than the limit."""


class CardError(ArtifactError):
    """An expert's card is not in the agreed form."""


class CardChangedError(ArtifactError):
    """An expert's card is not what was signed."""


class UnknownSignerError(ArtifactError):
    """An expert is not signed by whom its card names."""


class MissingTensorError(ArtifactError):
    """A tensor that an expert's card promises is not there."""


class ExtraTensorError(ArtifactError):
    """There is a tensor that an expert's card does not know."""


class TensorShapeError(ArtifactError):
    """A tensor has another shape than an expert's card says, or the study."""


class TensorTypeError(ArtifactError):
    """A tensor has another dtype than float32."""


class NotFiniteError(ArtifactError):
    """An expert's weights hold a NaN or an infinity."""


class WeightsChangedError(ArtifactError):
    """An expert's weights are not those that were signed."""


class OtherExpertError(ArtifactError):
    """An expert is not the one that was asked for: of another cancer, or without other folds."""


class EncoderMismatchError(ArtifactError):
    """An expert was trained on another encoder's features."""


class BinsMismatchError(ArtifactError):
    """An expert was trained for other time bins."""


class StartMismatchError(ArtifactError):
    """An expert was trained from another M0 than the study's."""


class StudyMismatchError(ArtifactError):
    """An expert was trained under other settings than the study's."""


class RevokedExpertError(ArtifactError):
    """The coordinator revoked an expert, or one that it was made from."""


class MessageError(CropktError, ValueError):
    """A message that the contract between coordinator and sites does not know."""

    exit_code = 76


class VersionMismatchError(CropktError):
    """The two sides run versions that do not go together."""

    exit_code = 76


class RefusedError(CropktError):
    """One side does not trust the other, or the coordinator says no."""

    exit_code = 77


class RevokedSiteError(RefusedError):
    """The coordinator cut this site off, or withdrew its invite."""


class BudgetError(RefusedError):
    """What is left of a cohort's privacy budget does not allow it."""


class UnavailableError(CropktError):
    """The coordinator cannot be reached, for now."""

    exit_code = 69


class DiskFullError(CropktError):
    """A disk takes no more."""

    exit_code = 74


class TrainingFailedError(CropktError, RuntimeError):
    """Training diverged, or its process died."""

    exit_code = 70


class ConfigError(CropktError, ValueError):
    """A value in a configuration file or preset is wrong."""

    exit_code = 78


class StudyError(CropktError):
    """The study finished, but rows of it failed or are missing."""

    exit_code = 3

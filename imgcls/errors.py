"""The exceptions that a person can act on.

    ImgclsError
    |-- RecipeError
    |-- DataError
    |   |-- NoSourceError
    |   `-- DamagedError
    |-- StorageError
    |   `-- MissingError
    |-- CheckpointError
    |   `-- NumericsError
    |-- TrainingError
    |-- LeaseError
    |-- PlacementError
    `-- ClusterError

Each takes one string, so that it survives pickling between processes: what was wrong, where, what to do.
"""


class ImgclsError(Exception):
    """A person can mend it as the message says; shown without a traceback."""


class RecipeError(ImgclsError):
    """The request is wrong: change the command or the recipe."""


class DataError(ImgclsError):
    """Images, shards or a manifest are wrong: mend them, or pack again."""


class NoSourceError(DataError):
    """There are no images to pack, neither here nor within reach."""


class DamagedError(DataError):
    """A record's bytes are not those that were written."""


class StorageError(ImgclsError):
    """Bytes could not be read or written: mend the place or the rights."""


class MissingError(StorageError):
    """The file or object to read does not exist."""


STORAGE_FAILED = f"{StorageError.__name__}: "
"""The beginning of an attempt's recorded error if storage failed: another attempt may succeed."""


class CheckpointError(ImgclsError):
    """A checkpoint does not fit, or is damaged."""


class NumericsError(CheckpointError):
    """The checkpoint fits, but the run would continue with other last bits: accept them, or return to the old numerics."""


class TrainingError(ImgclsError):
    """The training itself went wrong, on every rank in the same way: change the recipe."""


class LeaseError(ImgclsError):
    """Another command works on this run: wait for it, or stop it."""


class PlacementError(ImgclsError):
    """The run can never start on the requested workers."""


class ClusterError(ImgclsError):
    """Ray cannot start here, or a cluster does not answer."""


def first_line(error: object) -> str:
    """Of what it says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

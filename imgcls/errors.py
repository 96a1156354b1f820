"""The exceptions that a person can act on.

    ImgclsError
    |-- RecipeError       the request is wrong: change the command or the recipe
    |-- DataError         images, shards or a manifest are wrong: mend or pack again
    |   |-- NoSourceError     there are no images to pack, neither here nor within reach
    |   `-- DamagedError      a record's bytes are not those that were written
    |-- StorageError      bytes could not be read or written: mend the place or the rights
    |   `-- MissingError      what was to be read is not there
    |-- CheckpointError   a checkpoint does not fit, or is damaged
    |   `-- NumericsError     it fits, but would go on with other last bits: say so, or go back
    |-- TrainingError     the training itself went wrong, alike on every rank: change the recipe
    |-- LeaseError        another command is at this run: wait for it, or stop it
    |-- PlacementError    it can never run on the workers that were asked for
    `-- ClusterError      Ray cannot be started here, or a cluster does not answer

Each takes one string, so that it survives pickling between processes: what was wrong, where, what to do.
"""


class ImgclsError(Exception):
    """Something that the message tells how to mend; shown without a traceback."""


class RecipeError(ImgclsError):
    pass


class DataError(ImgclsError):
    pass


class NoSourceError(DataError):
    pass


class DamagedError(DataError):
    pass


class StorageError(ImgclsError):
    pass


class MissingError(StorageError):
    pass


STORAGE_FAILED = f"{StorageError.__name__}: "
"""So begins, in an attempt's record, an end that another try may not meet."""


class CheckpointError(ImgclsError):
    pass


class NumericsError(CheckpointError):
    pass


class TrainingError(ImgclsError):
    pass


class LeaseError(ImgclsError):
    pass


class PlacementError(ImgclsError):
    pass


class ClusterError(ImgclsError):
    pass

"""The errors a user can cause. Each carries one line: what is wrong, where, and what to do."""


class HasteError(Exception):
    """Base of all errors that are reported as one line (no traceback) with exit status 2."""


class ConfigError(HasteError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another one."""


class DataError(HasteError):
    """Input text, labels, or a prepared folder cannot be used as they are."""


class CheckpointError(HasteError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another run."""


class OutOfMemory(HasteError):
    """The memory of a device, or of a machine, is full."""


class Interrupted(HasteError):
    """The user asked to stop; everything worth keeping has been saved. Exit status 130."""

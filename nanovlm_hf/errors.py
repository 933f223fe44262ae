"""The errors that a user's input causes and a user can mend."""


class InputError(ValueError):
    """Bad input, said in one line: which file or field, what is wrong, how to mend it.

    The `nanovlm` command and `training/train.py` print the line without a traceback.
    """


class UsageError(InputError):
    """A wrong call of the command: exit code 2."""

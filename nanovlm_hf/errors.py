"""The errors that a user's input causes and a user can mend."""


class InputError(ValueError):
    """Bad input, said in one line: which file or field, what is wrong, how to mend it.

    The `nanovlm` command and `training/train.py` print the line without a traceback.
    """


class UsageError(InputError):
    """A wrong call of the command: exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

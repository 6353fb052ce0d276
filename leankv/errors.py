"""The one exception type that users are meant to see, and the errors of others that end in a sentence too."""

import errno


class UserError(ValueError):
    """Something the user can mend: one sentence that names the thing and the way out.

    The command line prints it without a traceback and exits with code 2; in Python it is an ordinary `ValueError`.
    Broken invariants are assertions, never this.
    """


class NoPlanError(UserError):
    """No plan keeps within one budget, or reaches a ratio; another budget may have one."""


def first_line(error: BaseException) -> str:
    """What an error of others says first; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sentence_of(error: BaseException) -> str | None:
    """One sentence on an error that the user can mend; None of any other error, which wants its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "the device ran out of memory; use shorter blocks, --device-map auto or --load-in-4bit"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'the disk'}: {error.strerror}; mend that and run the command again"
    return None

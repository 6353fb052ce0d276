"""The one exception type that users are meant to see."""


class UserError(ValueError):
    """Something the user can mend: one sentence that names the thing and the way out.

    The command line prints it without a traceback and exits with code 2; in Python it is an ordinary `ValueError`.
    Broken invariants are assertions, never this.
    """

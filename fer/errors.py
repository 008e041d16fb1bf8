"""The one exception a user sees as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence (or a short block) naming the file, row or key, what was expected, and the override
    or action that mends it. Commands print it without a traceback and exit with code 2.
    """

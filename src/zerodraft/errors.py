"""The one exception type for mistakes that a user can mend: a single clear sentence, shown as it is by the CLI (exit code 2)."""


class ZerodraftError(ValueError):
    """Bad input: the message names the value, says what was expected and what to do about it."""

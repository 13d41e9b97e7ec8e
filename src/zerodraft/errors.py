"""The one exception type for mistakes that a user can mend: one clear sentence, which the CLI shows as it is."""


class ZerodraftError(ValueError):
    """Bad input: the message names the value, says what was expected and what to do about it."""

"""The one exception for problems that a user can mend."""


class CalrError(Exception):
    """What is wrong, where (layer, file or argument), and what to do about it, in one sentence."""

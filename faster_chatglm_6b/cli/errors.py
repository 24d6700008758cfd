"""The error of a command that cannot go on."""


class CommandError(Exception):
    """One sentence for the user, and the exit code: 1, or 2 if what was typed can never work."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code

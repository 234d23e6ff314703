"""Mistakes of the user: one line that says what is wrong, where, and how to mend it.

The command line prints such a line and exits with status 2; everything else is a bug and keeps its traceback.
"""

COMMAND_LINE = "command line"


class UserError(Exception):
    """A mistake that the user can mend; the message is folded into one line that every terminal can show."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


class UserNote(UserWarning):
    """Something that the user should know while the work goes on; the command line prints it as one line."""


class ConfigError(UserError):
    """A value in a config that is wrong by itself or beside another one.

    `__post_init__` of a config raises it with the name of its own field as `key`; the loader adds the path to
    that config and the place (file and line, or the command line) from which the value came.
    """

    def __init__(self, message: str, key: str = "", where: str = "") -> None:
        self.message = message
        self.key = key
        self.where = where
        shown_key = f"--{key}" if key and where == COMMAND_LINE else key
        super().__init__(": ".join(part for part in (where, shown_key, message) if part))

    def inside(self, path: tuple[str | int, ...]) -> "ConfigError":
        """The same error, seen from a config that holds this one at `path`."""
        parts = [str(part) for part in path] + ([self.key] if self.key else [])
        return ConfigError(self.message, ".".join(parts), self.where)

    def at(self, where: str) -> "ConfigError":
        """The same error with its place, if it has none yet."""
        return ConfigError(self.message, self.key, self.where or where)

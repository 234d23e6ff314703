"""The texts of a recipe on which statistics are measured."""

from dataclasses import dataclass
from pathlib import Path

from jaxlab.data import read_table
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import named


@dataclass(frozen=True)
class MergeData:
    """Texts on which an operator's statistics are measured."""

    text: str | dict[str, str] = ""
    """A file for all models, or one for each by what it is called, {vlm: a.jsonl, expert: b.jsonl}: JSON
    Lines with a key text, or plain text of which each line is one."""
    length: int = 256
    """Tokens of a text that are read."""
    batch_size: int = 4
    """Texts at once."""
    batches: int = 32
    """At most so many."""
    steps: int = 100
    """Of operators that learn (adamerging)."""
    learning_rate: float = 0.01
    """Of these."""
    save: str | None = None
    """A new file that keeps the statistics, for `statistics:` of other recipes."""

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("missing; name a file, or one for each model", key="text")
        for name in ("length", "batch_size", "batches", "steps"):
            if getattr(self, name) < (2 if name == "length" else 1):
                raise ConfigError(f"is too small: {getattr(self, name)}", key=name)

    def files(self) -> list[Path]:
        """All of them."""
        return [named(name) for name in ([self.text] if isinstance(self.text, str) else self.text.values())]

    def file_of(self, role: str) -> Path:
        """The texts of one model.

        Raises:
          ConfigError: there are none.
        """
        if isinstance(self.text, str):
            return named(self.text)
        if role not in self.text:
            raise ConfigError(f"no file for {role}", key="data.text")
        return named(self.text[role])


def read_texts(path: Path, count: int) -> list[str]:
    """The first texts of a file that are not empty.

    Raises:
      UserError: it cannot be read, or holds none.
    """
    if path.suffix in (".jsonl", ".ndjson", ".json", ".parquet", ".csv"):
        found = [row.values[0] for row in read_table(path, ["text"])]
    else:
        try:
            found = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text in UTF-8"
            raise UserError(f"{path}: cannot be read: {reason}") from None
    texts = [text for text in found if text.strip()]
    if not texts:
        raise UserError(f"{path}: holds no text")
    return texts[:count]

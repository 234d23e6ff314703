"""Text classification tasks: where their examples are, their template and label words.

The four named sets are those of Wang et al. 2023 (arXiv 2305.14160), with the templates and label words of
its table 5. A new task is a config of kind `classification`, or a subclass with other defaults.
"""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from jaxlab.config import suggestion
from jaxlab.data import Row, TableFormat, is_dataset, read_dataset, read_table
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import shipped

Split = Literal["validation", "test"]
TooLong = Literal["refuse", "drop_demonstrations", "truncate_text"]
PLACEHOLDER = re.compile(r"\{(\w+)\}")
WHOLE = re.compile(r"(?<=\d)\.0+$")
"""What tools that hold labels as floats write after a whole number."""


@dataclass(frozen=True)
class ExamplesConfig:
    """A file of labelled texts, or a split of a data set of the hub's form. What is not given here for `test`
    is as for `train`."""

    file: str = ""
    """The file within data.path: .csv, .tsv, .txt, .jsonl, .json or .parquet; or the name of a split."""
    text: tuple[str | int, ...] | None = None
    """The columns of the text, joined by spaces: names, or numbers from 0. Default: [text]."""
    label: str | int | None = None
    """The column of the label. Default: label."""
    label_values: tuple[str | int, ...] | None = None
    """What that column holds for each label word, in their order. Default: 0, 1, 2, ..."""
    label_until: str | None = None
    """Only what stands before this in the label's column counts, like ":" in DESC:manner."""
    lowercase: bool | None = None
    """Whether texts are lower-cased."""
    delimiter: str | None = None
    """Between columns. Default: a comma in .csv, a tab elsewhere."""
    header: bool | None = None
    """Whether the first line names the columns. Default: where columns are given by name."""
    quotes: bool | None = None
    """Whether "..." around a field is taken off. Default: in .csv."""
    encoding: str | None = None
    """Default: utf-8."""

    def over(self, other: "ExamplesConfig") -> "ExamplesConfig":
        """This one, with what it does not say taken from the other."""
        names = [field.name for field in dataclasses.fields(self)]
        given = {name: getattr(self, name) for name in names}
        return ExamplesConfig(
            **{name: getattr(other, name) if given[name] in (None, "") else given[name] for name in names}
        )


@dataclass(frozen=True)
class ClassificationConfig:
    """Few-shot prompts for text classification."""

    kind: Literal["classification"] = "classification"
    path: str = ""
    """The folder of the files; or a folder that Hugging Face's datasets saved, or a hub id."""
    subset: str = ""
    """Of a hub id that has several, such as sst2 of nyu-mll/glue."""
    template: str = ""
    """One demonstration, like "Review: {text}\\nSentiment: {label}"; the query is cut before {label}. Columns
    of `text` may stand in it by their names."""
    label_words: tuple[str, ...] = ()
    """The words that the model is to answer."""
    train: ExamplesConfig = ExamplesConfig()
    """Where demonstrations are drawn from; of a split other than test, the queries too."""
    test: ExamplesConfig = ExamplesConfig()
    """Where queries are drawn from."""
    shots: int = 1
    """Demonstrations of each class."""
    separator: str = "\n"
    """Between demonstrations."""
    chat: bool = False
    """Whether demonstrations are turns of a conversation, by the model's chat template."""
    system: str = ""
    """With chat: what the conversation begins with."""
    max_tokens: int | None = None
    """The most tokens of a prompt. Default: what the model was made for."""
    too_long: TooLong = "refuse"
    """What is done about longer prompts: refuse them, drop demonstrations from the front, or cut the longest
    texts at their ends."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What is done about rows without text, or with an unknown label."""

    hub: ClassVar[tuple[ExamplesConfig, ExamplesConfig] | None] = None
    """Train and test of a data set of the hub's form, where a named set has one."""

    def __post_init__(self) -> None:
        for name in ("template", "label_words", "path"):
            if not getattr(self, name):
                raise ConfigError("must be given", key=name)
        if not self.train.file:
            raise ConfigError("which file are demonstrations drawn from?", key="train.file")
        names = PLACEHOLDER.findall(self.template)
        if names.count("label") != 1 or names[-1] != "label" or len(names) < 2:
            raise ConfigError(
                'must hold {text} (or columns) and after it {label}, each as in "Review: {text}\\nSentiment: '
                '{label}"',
                key="template",
            )
        if not self.template.partition("{label}")[0].strip().rpartition("}")[2].strip():
            raise ConfigError(
                "needs words between {text} and {label}: at the last of them the answer is read off",
                key="template",
            )
        if len(self.label_words) < 2:
            raise ConfigError("needs at least two label words", key="label_words")
        for number, word in enumerate(self.label_words):
            if not word.strip():
                raise ConfigError("a label word must not be empty", key="label_words")
            if word in self.label_words[:number]:
                raise ConfigError(f"holds {word!r} twice", key="label_words")
        for name in ("shots", "max_tokens"):
            value, least = getattr(self, name), 0 if name == "shots" else 1
            if value is not None and value < least:
                raise ConfigError(f"must be at least {least}, is {value}", key=name)
        if self.system and not self.chat:
            raise ConfigError("is for conversations; set chat to true", key="system")
        for part in ("train", "test"):
            values = getattr(self, part).label_values
            if values is None:
                continue
            if len(values) != len(self.label_words):
                raise ConfigError(
                    f"has {len(values)} values for {len(self.label_words)} label words",
                    key=f"{part}.label_values",
                )
            written = [str(value).strip() for value in values]
            if len(set(written)) < len(written):
                raise ConfigError(
                    f"stands for one label word each: {list(values)} has one of them twice",
                    key=f"{part}.label_values",
                )


@dataclass(frozen=True)
class SST2Config(ClassificationConfig):
    """SST-2: movie reviews, two sentiments (Socher et al. 2013, in the form of GLUE)."""

    kind: Literal["sst2"] = "sst2"  # type: ignore[assignment]
    path: str = "stanfordnlp/sst2"
    template: str = "Review: {text}\nSentiment: {label}"
    label_words: tuple[str, ...] = ("Negative", "Positive")
    train: ExamplesConfig = ExamplesConfig("train.tsv", text=("sentence",))
    test: ExamplesConfig = ExamplesConfig("validation.tsv")
    hub: ClassVar = (ExamplesConfig("train", text=("sentence",)), ExamplesConfig("validation"))


@dataclass(frozen=True)
class TRECConfig(ClassificationConfig):
    """TREC: questions by what they ask for, six coarse types (Li and Roth 2002)."""

    kind: Literal["trec"] = "trec"  # type: ignore[assignment]
    path: str = "CogComp/trec"
    template: str = "Question: {text}\nAnswer Type: {label}"
    label_words: tuple[str, ...] = ("Abbreviation", "Entity", "Description", "Person", "Location", "Number")
    train: ExamplesConfig = ExamplesConfig(
        "train.txt",
        text=(1,),
        label=0,
        label_values=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        label_until=":",
        delimiter=" ",
    )
    test: ExamplesConfig = ExamplesConfig("test.txt")
    hub: ClassVar = (ExamplesConfig("train", label="coarse_label"), ExamplesConfig("test"))


@dataclass(frozen=True)
class AGNewsConfig(ClassificationConfig):
    """AG News: articles by topic, four of them (Zhang et al. 2015)."""

    kind: Literal["agnews"] = "agnews"  # type: ignore[assignment]
    path: str = "fancyzhx/ag_news"
    template: str = "Article: {text}\nAnswer: {label}"
    label_words: tuple[str, ...] = ("World", "Sports", "Business", "Technology")
    train: ExamplesConfig = ExamplesConfig("train.csv", text=(0,), label=1)
    test: ExamplesConfig = ExamplesConfig(
        "test.csv", text=("Title", "Description"), label="Class Index", label_values=(1, 2, 3, 4)
    )
    hub: ClassVar = (ExamplesConfig("train"), ExamplesConfig("test"))


@dataclass(frozen=True)
class EmoCConfig(ClassificationConfig):
    """EmoContext: dialogues of three turns, four emotions (Chatterjee et al. 2019)."""

    kind: Literal["emoc"] = "emoc"  # type: ignore[assignment]
    path: str = "SemEvalWorkshop/emo"
    template: str = "Dialogue: {text}\nEmotion: {label}"
    label_words: tuple[str, ...] = ("Others", "Happy", "Sad", "Angry")
    train: ExamplesConfig = ExamplesConfig(
        "train.txt",
        text=(1, 2, 3),
        label=4,
        label_values=("others", "happy", "sad", "angry"),
        lowercase=True,
    )
    test: ExamplesConfig = ExamplesConfig("test.txt")
    hub: ClassVar = (ExamplesConfig("train"), ExamplesConfig("test"))


class Example(NamedTuple):
    """A labelled text."""

    fields: tuple[str, ...]
    """Of each column of the text."""
    label: int
    """As an index into the label words."""
    where: str
    """The place in its file."""

    @property
    def text(self) -> str:
        return " ".join(field for field in self.fields if field)


class Examples(NamedTuple):
    """What a task's files hold."""

    train: list[Example]
    test: list[Example]
    columns: tuple[str, ...]
    """Names of the columns of the text, for templates that name them."""


def read_examples(config: ClassificationConfig, split: Split = "test") -> Examples:
    """The examples of a task, those that are there twice only once.

    Args:
      split: of which queries are asked; of `validation` all may stand in one file, and `test` is then empty.

    Raises:
      UserError: a file is missing or damaged, or a row has no text or an unknown label; the line says where.
    """
    path = shipped(config.path)
    of_hub = is_dataset(path) or not path.exists()
    if of_hub and not is_dataset(path) and not _is_hub_id(config.path):
        raise UserError(f"{path}: no such folder; set data.path to the folder of the set's files")
    if config.subset and not of_hub:
        raise UserError(
            f"{path}: holds files, of which train.file and test.file name some; leave data.subset out"
        )
    parts = {"train": config.train, "test": config.test}
    if of_hub and config.hub is not None:
        standard = type(config)
        parts = {
            name: form if parts[name] == getattr(standard, name) else parts[name]
            for name, form in zip(parts, config.hub, strict=True)
        }
    parts["test"] = parts["test"].over(parts["train"])
    if parts["test"].file == parts["train"].file:
        if split == "test":
            raise UserError(
                f"data: demonstrations and queries are drawn from one file, {parts['test'].file}; give "
                "test.file (or --split validation, which takes queries from train that are no "
                "demonstrations)"
            )
        del parts["test"]
    found = {}
    for name, part in parts.items():
        form = part.over(ExamplesConfig(text=("text",), label="label", encoding="utf-8"))
        assert form.text is not None
        assert form.label is not None
        assert form.encoding is not None
        columns = (*form.text, form.label)
        if of_hub:
            rows = read_dataset(str(path), form.file, columns, config.subset)
        else:
            place = path / form.file if path.is_dir() else path
            table = TableFormat(form.delimiter, form.header, form.quotes, form.encoding)
            rows = read_table(place, columns, table)
        found[name] = _examples(rows, form, config, name)
    train, test = _apart(found["train"], found.get("test", []))
    for number, word in enumerate(config.label_words):
        have = sum(example.label == number for example in train)
        if have < config.shots:
            raise UserError(
                f"data: {have} examples of {word} in {parts['train'].file}, and {config.shots} are "
                "needed for demonstrations; lower shots"
            )
    names = parts["train"].text or ("text",)
    return Examples(train, test, tuple(map(str, names)))


def examples_identity(config: ClassificationConfig) -> str:
    """A digest of a task's files: it changes when they do.

    Raises:
      UserError: as `read_examples`, where the set is one of the hub.
    """
    path = shipped(config.path)
    if not path.exists():
        with warnings.catch_warnings(action="ignore", category=UserNote):  # said when the run reads them
            found = read_examples(config, "validation")
        return hashlib.sha256(json.dumps(found, ensure_ascii=True).encode()).hexdigest()
    digest = hashlib.sha256()
    if is_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        names = dict.fromkeys([config.train.file, config.test.file or config.train.file])
        files = [path / name for name in names] if path.is_dir() else [path]
    for file in files:
        digest.update(json.dumps(file.name).encode())
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read: {error.strerror}; set data.path and the files"
            ) from None
    return digest.hexdigest()


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _examples(
    rows: Sequence[Row], form: ExamplesConfig, config: ClassificationConfig, name: str
) -> list[Example]:
    values = form.label_values or tuple(range(len(config.label_words)))
    number_of = {str(value).strip(): number for number, value in enumerate(values)}
    found: list[Example] = []
    seen: dict[tuple[tuple[str, ...], int], str] = {}
    bad: list[str] = []
    repeated: list[str] = []
    for row in rows:
        *fields, label = row.values
        texts = tuple(" ".join(field.split("\n")).strip() for field in fields)
        if form.lowercase:
            texts = tuple(text.lower() for text in texts)
        label = label.partition(form.label_until)[0] if form.label_until else label
        number = number_of.get(label.strip(), number_of.get(WHOLE.sub("", label.strip())))
        if number is None:
            bad.append(f"{row.where}: unknown label {label.strip()!r}{suggestion(label, number_of)}")
        elif not any(texts):
            bad.append(f"{row.where}: the text is empty")
        elif (texts, number) in seen:
            repeated.append(f"{row.where} repeats {seen[texts, number].rpartition(' ')[2]}")
        else:
            seen[texts, number] = row.where
            found.append(Example(texts, number, row.where))
    if bad and config.bad_rows == "refuse":
        more = f", and {len(bad) - 1} more such rows" if len(bad) > 1 else ""
        known = ", ".join(list(number_of)[:8])
        raise UserError(
            f"{bad[0]}{more}; labels are {known} (data.{name}.label_values); mend them, say whether "
            "there is a header (header), or set data.bad_rows to skip"
        )
    for what, lines in (("left out", bad), ("left out, they are there twice", repeated)):
        if lines:
            warnings.warn(f"{len(lines)} rows are {what}; the first: {lines[0]}", UserNote, stacklevel=2)
    if not found:
        raise UserError(f"data.{name}: no row is left")
    return found


def _apart(train: list[Example], test: list[Example]) -> tuple[list[Example], list[Example]]:
    """Demonstrations that are no queries: a text that is both would give its own answer."""
    asked = {example.fields for example in test}
    kept = [example for example in train if example.fields not in asked]
    if len(kept) < len(train):
        warnings.warn(
            f"{len(train) - len(kept)} rows of the demonstrations are queries too, and are left out of the "
            "demonstrations",
            UserNote,
            stacklevel=2,
        )
    return kept, test

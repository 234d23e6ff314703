"""Task `prepare`: tokenises the data of a train config, once; `train` does it too at first use."""

from typing import Any

from jaxlab.app import Run, model_folder
from jaxlab.data import DocumentsConfig, DocumentsSource
from jaxlab.errors import ConfigError
from jaxlab.training import TrainConfig

Config = TrainConfig

SHOWN = ("tokens", "documents", "rows", "fill")
"""What the last line of a run shows, of the training split."""


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    return {"data": _source(config).identity}


def still_done(config: Config) -> bool:
    """Whether what a finished run has made is still there."""
    return _source(config).prepared


def check(config: Config) -> dict[str, Any]:
    """What `--check` reports: how much there is to tokenise. The data is not read."""
    source = _source(config)
    return {"cache": str(source.cache), "prepared": source.prepared, "data": source.files()}


def run(config: Config, run: Run) -> dict[str, Any]:
    source = _source(config)
    source.prepare()
    source.training_rows()  # or there is nothing to train on: said now, not by `train`
    splits = source.describe()
    training = splits["train"].values()
    places = sum(one["rows"] for one in training) * source.config.sequence_length
    tokens = sum(one["tokens"] for one in training)
    return {
        "cache": str(source.cache),
        "end_of_text": source.end_of_text,
        "documents": sum(one["documents"] for one in training),
        "tokens": tokens,
        "rows": places // source.config.sequence_length,
        "fill": tokens / places if places else None,
        "splits": splits,
        "passed_by": {title: counts.to_json() for title, counts in source.counts().items()},
    }


def _source(config: Config) -> DocumentsSource:
    if not isinstance(config.data, DocumentsConfig):
        raise ConfigError(
            f"{config.data.kind} is read as it is; documents alone are prepared", key="data.kind"
        )
    return DocumentsSource(config.data, model_folder)

"""Data sets that are small enough to be read by eye, and what is in a source made of one."""

import gzip
import json
from pathlib import Path

from jaxlab.data import DataSet, DocumentsConfig, DocumentsSource
from jaxlab.data.documents.shards import open_shard


def find_model(name: str) -> Path:
    return Path(name)


def write_lines(path: Path, rows) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def source(path, *, sequence_length=16, held_out=0.0, on=None, **changes) -> DocumentsSource:
    """A source of one data set, all of it for training unless said otherwise."""
    data = DataSet(str(path), **(on or {}))
    config = DocumentsConfig(sources=(data,), sequence_length=sequence_length, held_out=held_out, **changes)
    return DocumentsSource(config, find_model)


def documents(found: DocumentsSource) -> list[list[int]]:
    """The tokens of all documents, in the order in which they are kept."""
    result = []
    for units in found._units.values():
        for unit in units:
            for path in unit.shards():
                shard = open_shard(path)
                begin = 0
                for end in shard.ends.tolist():
                    result.append(shard.tokens[begin:end].tolist())
                    begin = end
    return result


def texts(found: DocumentsSource) -> list[str]:
    """Documents of bytes as texts, without the byte that ends each."""
    kept = documents(found)
    assert all(tokens[-1] == 0 for tokens in kept)
    return [bytes(tokens[:-1]).decode() for tokens in kept]

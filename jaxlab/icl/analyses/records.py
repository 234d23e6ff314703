"""What analyses measured, on disk chunk by chunk, so that a run that was stopped goes on where it was."""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.costs import let_go_of_programs
from jaxlab.errors import UserError
from jaxlab.files import write_atomic, writing
from jaxlab.icl.analyses.base import Analysis, PromptAnalysis, Records, Study
from jaxlab.icl.prompts import Prompts


class ChunkStore:
    """Records in a folder, one file for each analysis, seed and chunk; at the end one for each analysis."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for torn in folder.glob(".*.npz.????????"):  # of a writer that was killed
                torn.unlink()

    def _file(self, analysis: str, seed: int, chunk: int) -> Path:
        return self.folder / f"{analysis}-{seed}-{chunk}.npz"

    def read(self, analysis: str, seed: int, chunk: int) -> Records | None:
        """None: not measured yet.

        Raises:
          UserError: the file is damaged.
        """
        file = self._file(analysis, seed, chunk)
        return _read(file) if file.exists() else None

    def write(self, analysis: str, seed: int, chunk: int, records: Records) -> None:
        write_atomic(self._file(analysis, seed, chunk), _packed(records))

    def finished(self, analysis: str) -> dict[int, Records] | None:
        """The records of each seed, if the analysis came to its end.

        Raises:
          UserError: the file is damaged.
        """
        file = self.folder / f"{analysis}.npz"
        if not file.exists():
            return None
        found: dict[int, Records] = {}
        for name, values in _read(file).items():
            kept, _, seed = name.rpartition("_")
            found.setdefault(int(seed), {})[kept] = values
        return found

    def finish(self, analysis: str, records: dict[int, Records], chunks: dict[int, int]) -> None:
        """One file with all seeds, `<name>_<seed>`, in place of those of the chunks."""
        together = {f"{name}_{seed}": x for seed, one in records.items() for name, x in one.items()}
        write_atomic(self.folder / f"{analysis}.npz", _packed(together))
        for seed, count in chunks.items():
            for chunk in range(count):
                self._file(analysis, seed, chunk).unlink(missing_ok=True)


def run_analysis[Chunk](
    analysis: Analysis[Chunk], study: Study, store: ChunkStore, advance: Callable[[], Any]
) -> dict[str, Any]:
    """The results of one analysis; what `store` has already is not measured again.

    Args:
      advance: called after each chunk.
    """
    done = store.finished(analysis.name)
    if done is not None:
        return analysis.summarize(study, done)
    records: dict[int, Records] = {}
    counts: dict[int, int] = {}
    earlier: dict[int, list[Records]] = {}
    for seed in study.seeds:
        chunks = analysis.chunks(study, seed)
        counts[seed] = len(chunks)
        parts = earlier[seed] = []
        for number, chunk in enumerate(chunks):
            part = store.read(analysis.name, seed, number)
            if part is None:
                rng = np.random.default_rng((seed, 1, number))
                part = analysis.measure_after(study, seed, chunk, rng, earlier)
                if isinstance(analysis, PromptAnalysis) and isinstance(chunk, Prompts):
                    part = {name: value[chunk.real] for name, value in part.items()}
                    part["row"] = chunk.rows[chunk.real]
                store.write(analysis.name, seed, number, part)
            parts.append(part)
            let_go_of_programs()
            advance()
        if parts:
            records[seed] = _joined(parts)
    results = analysis.summarize(study, records)
    store.finish(analysis.name, records, counts)
    return results


def _joined(parts: Sequence[Records]) -> Records:
    """The records of a seed in the order of its prompts, where they say which those are."""
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "row" in found:
        order = np.argsort(found["row"], kind="stable")
        found = {name: values[order] for name, values in found.items()}
    return found


def _packed(records: Records) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **records)
    return buffer.getvalue()


def _read(file: Path) -> Records:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: damaged ({error}); remove it, and it is measured again") from None

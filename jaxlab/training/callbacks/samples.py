"""What the model writes after prompts, while it is trained."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.distributed import is_main
from jaxlab.errors import UserError
from jaxlab.files import write_atomic, writing
from jaxlab.models import ModelConfig, generate, to_host, using
from jaxlab.processing import TextStream, check_token_ids, encode
from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import Callback, Loop, Setup
from jaxlab.training.monitoring import SamplesConfig

FILE = "samples.jsonl"


def read_prompts(config: SamplesConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The prompts as tokens.

    Raises:
      UserError: one is empty, too long, or the model cannot generate.
    """
    if model.attention.kind == "nsa" and model.nsa.selector == "auxiliary":
        raise UserError(
            "samples: NSA's auxiliary selector keeps no cache to generate from; leave samples out"
        )
    found = []
    for number, prompt in enumerate(config.prompts):
        where = f"samples.prompts.{number}"
        ids = encode(prompt, tokenizer, where=where)
        check_token_ids(ids, model, tokenizer, where=where)
        if not 0 < len(ids) <= model.max_length - config.max_new_tokens:
            raise UserError(
                f"{where}: {len(ids)} tokens and {config.max_new_tokens} new ones; the model takes "
                f"{model.max_length}"
            )
        found.append(list(ids))
    return found


class WriteSamples(Callback):
    """Lines {"step", "prompt", "text"} in the run's folder, `samples.jsonl`."""

    def __init__(self, samples: SamplesConfig, config: TrainConfig, setup: Setup) -> None:
        """
        Raises:
          UserError: a prompt does not fit the model.
        """
        self.config, self.every = samples, samples.every or config.eval_every
        self.tokenizer = setup.source.tokenizer()
        self.prompts = read_prompts(samples, config.model, self.tokenizer)

    def on_train_begin(self, loop: Loop) -> None:
        if is_main():
            drop_later(loop.run.path / FILE, loop.done)

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        lines = []
        for prompt, ids in zip(self.config.prompts, self.prompts, strict=True):
            with using(loop.setup.mesh):
                new = generate(
                    loop.whole(loop.trained),
                    {"tokens": np.asarray([ids], np.int32)},
                    loop.config.model,
                    max_new_tokens=self.config.max_new_tokens,
                    temperature=self.config.temperature,
                    key=jax.random.fold_in(jax.random.key(loop.config.seed), loop.done),
                )
            stream = TextStream(self.tokenizer, ids)
            text = "".join(map(stream.add, to_host(new)[0].tolist()))
            lines.append(json.dumps({"step": loop.done, "prompt": prompt, "text": text}) + "\n")
        if not is_main():
            return
        path = loop.run.path / FILE
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        return {"samples": FILE}


def drop_later(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and one that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))

"""How a model's authors sample from it, as its generation_config.json says."""

from collections.abc import Mapping
from typing import Any

from jaxlab.errors import UserError
from jaxlab.models import Sampling

OPTIONS: Mapping[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Options of `jaxlab.models.stream`, with their defaults."""
_NOT_DONE: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}
"""What transformers does by it and nobody does here, with the value that means nothing."""


def sampling_options(
    said: Mapping[str, Any], asked: Mapping[str, Any], place: str
) -> tuple[dict[str, Any], list[str]]:
    """Options of `stream`: those that are asked for, else those of the file, else the most likely token.

    A file that samples (do_sample) and names no temperature or top_k means those of transformers, 1 and 50.

    Args:
      said: what the file holds.
      asked: options by name; None: not asked for.
      place: the file, for messages.

    Returns:
      The options, and what the user should know of them, a line each.

    Raises:
      UserError: the file holds a value that is none of its option.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    of_file = {name: said[name] for name in OPTIONS if said.get(name) is not None}
    for name, value in of_file.items():
        if type(value) is not int and (name == "top_k" or type(value) is not float):
            raise UserError(
                f"{place}: {name} is {str(value)[:40]!r}, no number for it; mend it or take it out"
            )
    if said.get("do_sample") is True:
        of_file = {"temperature": 1.0, "top_k": 50, **of_file}
    else:
        of_file.pop("temperature", None)
    options = {**OPTIONS, **of_file, **asked}
    try:
        options = {name: type(OPTIONS[name])(value) for name, value in options.items()}
        steps = Sampling(**options).steps
    except (ValueError, OverflowError) as error:
        raise UserError(f"{place}: {error}") from None
    notes = []
    if taken := [f"{name} {options[name]:g}" for name in steps if name in of_file and name not in asked]:
        notes.append(
            f"sampling as the model's generation_config.json says: {', '.join(taken)}; --temperature 0 takes "
            "the most likely token"
        )
    active = lambda name, nothing: said.get(name, nothing) not in (nothing, None)
    if left := [name for name, nothing in _NOT_DONE.items() if active(name, nothing)]:
        notes.append(f"generation_config.json also says {', '.join(left)}, which is not done here")
    return options, notes


def stop_strings(said: Mapping[str, Any], place: str) -> list[str]:
    """Texts that end an answer.

    Raises:
      UserError: they are none.
    """
    found = said.get("stop_strings") or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{place}: stop_strings is not a list of texts")
    return found

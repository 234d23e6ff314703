"""Task `generate`: text from a model, of one prompt, of many, or as a chat."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
from jax.sharding import Mesh

from jaxlab.app import reference_folders
from jaxlab.checkpoints import OPTIONS, OpenModel, open_model, sampling_options
from jaxlab.config import POSITIONAL, REPEATED
from jaxlab.costs import generation_memory
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.evaluation import Answer, fill_all, find_ends, image_mark, read_prompt, render_prompts
from jaxlab.models import (
    LEAST_TEMPERATURE,
    SplitConfig,
    count_params,
    model_mesh,
    using,
)
from jaxlab.processing import (
    Prompt,
    StopTexts,
    TextStream,
    encode,
    read_messages,
    read_prompts,
)

BYTES = 256
"""Tokens of a model that reads bytes."""


@dataclass(frozen=True)
class Arguments:
    """Stream text from a model."""

    model: Annotated[str, POSITIONAL]
    """A model folder, ours or Hugging Face's, the latter with a LoRA adapter as MODEL+ADAPTER; a hub id; a
    .gguf file; a .bin file of llama2.c; a run folder, or the config of a finished train run."""
    prompt: str | None = None
    """The text to go on from, or to answer (see chat); empty: from nothing."""
    prompts: str | None = None
    """A file of prompts instead: one in each line, or JSON Lines of {"prompt": text, "images": [files]}."""
    messages: str | None = None
    """A file of conversations instead, in JSON Lines: each line a message {"role": ..., "content": ...} of
    one conversation, or a conversation {"messages": [...]}."""
    image: tuple[str, ...] = ()
    """Image files for a vision-language model; before the prompt, unless it says where they are."""
    chat: bool = False
    """Ask by the model's chat template; by default where it has one and the prompt is plain text."""
    raw: bool = False
    """Take the prompt as it is, whatever template there is."""
    system: str = ""
    """What the model is told before a chat."""
    chat_template: str | None = None
    """The name of another one of the model's chat templates, or a file with one, in Jinja."""
    chat_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What the chat template asks for besides, such as --chat_options.enable_thinking false."""
    max_new_tokens: int = 200
    """Most tokens to make."""
    temperature: float | None = None
    """0: always the most likely token; higher: sampled. By default as the model's generation_config.json says
    (this and the next four), else 0."""
    top_k: int | None = None
    """Sample from so many of the most likely tokens; 0: from all."""
    top_p: float | None = None
    """Sample from the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Sample from tokens with at least this part of the highest probability."""
    repetition_penalty: float | None = None
    """Above 1: tokens of the prompt and of the text so far become less likely."""
    seed: int = 0
    """Of sampling. The same prompt and seed give the same text, in a batch or alone."""
    samples: int = 1
    """Answers to each prompt, drawn apart."""
    stop: Annotated[tuple[str, ...], REPEATED] = ()
    """Stop before this text, or at this special token."""
    past_end: bool = False
    """Go on where the model ends its text."""
    batch_size: int = 8
    """Prompts that are read together."""
    format: Literal["text", "jsonl"] | None = None
    """Of what is written; by default text for one answer, JSON Lines for several."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json that no family knows, to leave out."""
    ignore_tensors: tuple[str, ...] = ()
    """Tensors to leave out: names, with * and ? for what varies."""
    prefill_chunk: int | None = None
    """Read the prompt so many tokens at a time: less memory for long ones. Not with images."""
    mesh: SplitConfig = SplitConfig()
    """Devices over which the model is split, if one of them does not hold it."""
    check: bool = False
    """Make all checks and estimate the memory of each device; read no tensor and make nothing."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"must be finite and not negative, is {self.temperature}", key="temperature")
        if self.temperature and self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"must be 0 or at least {LEAST_TEMPERATURE}, is {self.temperature}", key="temperature"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"must not be negative, is {self.top_k} (0 keeps all tokens)", key="top_k")
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"must be between 0 and 1, is {getattr(self, name)}", key=name)
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"must be positive and finite, is {self.repetition_penalty}", key="repetition_penalty"
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"must be at least 1, is {self.prefill_chunk}", key="prefill_chunk")
        if self.prefill_chunk is not None and self.image:
            raise ConfigError("a prompt with images is read at once; leave it out", key="prefill_chunk")
        if self.chat and self.raw:
            raise ConfigError("a chat is not raw; give --chat or --raw", key="raw")
        if self.raw and self.messages is not None:
            raise ConfigError("messages are a chat; leave --raw out", key="raw")
        for name in ("system", "chat_template", "chat_options"):
            if self.raw and getattr(self, name):
                raise ConfigError("is for a chat; leave --raw out", key=name)
        given = [name for name in ("prompt", "prompts", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"--{given[0]} is given too; give one of them", key=given[1])
        if not given and not self.raw:
            raise ConfigError("give one, or --prompts or --messages FILE", key="prompt")
        if (self.image and self.prompts) or (self.image and self.messages):
            raise ConfigError("goes with --prompt; name images in the file", key="image")


def run(arguments: Arguments) -> None:
    found, adapter = reference_folders(arguments.model)
    opened = open_model(
        found,
        adapter=adapter,
        ignore_keys=arguments.ignore_keys,
        ignore_tensors=arguments.ignore_tensors,
    )
    folder, config = opened.path, opened.config
    if opened.tokenizer is None and config.family != "jaxlab":
        if config.vocab_size != BYTES:
            raise UserError(
                f"{folder}: has no tokenizer, and its {config.vocab_size} tokens are not the {BYTES} bytes; "
                "put its tokenizer.json into its folder"
            )
        _note(f"the model has no tokenizer and {BYTES} tokens: they are taken to be bytes")
    if config.attention.kind == "nsa" and config.nsa.selector == "auxiliary":
        raise UserError(f"{folder}: NSA's auxiliary selector keeps no cache to generate from; use evaluate")
    if config.attention.kind == "nsa" and config.nsa.selector_stage == "warm_up":
        raise UserError(
            f"{folder}: its indexer is in its warm-up and keeps no cache to generate from; "
            "train on from it with model.attention.selector_stage: sparse"
        )
    prompts = read_all(arguments)
    for where, text in (("--system", arguments.system), *((p.where, p.text) for p in prompts)):
        encode(text, None, where=where)  # checks that it is UTF-8
    if arguments.prefill_chunk is not None and (seen := next((p for p in prompts if p.images), None)):
        raise UserError(f"{seen.where}: a prompt with images is read at once; leave --prefill_chunk out")
    template = find_template(arguments, opened, prompts)
    if template is not None:
        prompts = render_prompts(
            prompts, template, opened, system=arguments.system, chat_options=arguments.chat_options
        )
    asked = {name: getattr(arguments, name) for name in OPTIONS}
    sampling, notes = sampling_options(opened.generation, asked, f"{folder}: generation_config.json")
    answers = make_answers(prompts, arguments, opened, chat=template is not None)
    for note in notes:
        _note(note)

    mesh = model_mesh(arguments.mesh)
    if arguments.check:
        with using(mesh):
            _print_memory(answers, arguments, opened, mesh)
        return
    params = opened.read(mesh=mesh, not_finite="warn")
    single = len(answers) == 1
    form = arguments.format or ("text" if single else "jsonl")
    with using(mesh):
        for made, pieces in fill_all(
            answers,
            params,
            config,
            sampling,
            jax.random.key(arguments.seed),
            batch_size=arguments.batch_size,
            prefill_chunk=arguments.prefill_chunk,
        ):
            for piece in pieces:
                if single and form == "text":
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            for answer in made:
                print(answer.as_json() if form == "jsonl" else "" if single else answer.text, flush=True)


def _print_memory(
    answers: Sequence[Answer], arguments: Arguments, opened: OpenModel, mesh: Mesh | None
) -> None:
    """Of the largest batch of texts, its images left out."""
    params = opened.placed(mesh)
    rows = min(len(answers), arguments.batch_size)
    longest = max(answer.length for answer in answers)
    budget = max(answer.budget for answer in answers)
    memory = generation_memory(
        params, opened.config, rows, min(longest, arguments.prefill_chunk or longest), budget
    )
    told = ", ".join(f"{what} {size:,}" for what, size in memory.items())
    texts = f"{rows} texts of {longest} and {budget} tokens"
    print(f"{opened.config.family}, {count_params(params):,} parameters; {texts}")
    print(f"bytes per device: {told}")


def read_all(arguments: Arguments) -> list[Prompt]:
    """What is asked: of the command line or of a file."""
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.messages is not None:
        return read_messages(arguments.messages)
    return [Prompt("--prompt", arguments.prompt or "", images=arguments.image)]


def find_template(arguments: Arguments, opened: OpenModel, prompts: Sequence[Prompt]) -> str | None:
    """The chat template by which prompts are asked; None: they are taken as they are."""
    if arguments.raw:
        return None
    name, known = arguments.chat_template, opened.chat_templates
    tools = any(prompt.variables.get("tools") for prompt in prompts)
    usual = "tool_use" if tools and "tool_use" in known else "default"
    template = known.get(name or usual)
    if name is not None and template is None:
        try:
            template = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            listed = f"the model's are {', '.join(sorted(known))}" if known else "the model has none"
            raise UserError(f"--chat_template {name}: no template, nor a text file; {listed}") from None
    if template is None:
        if arguments.chat or arguments.messages or arguments.system or arguments.chat_options:
            raise UserError(
                f"{opened.path}: has no chat template{_others(known)}; give one by --chat_template FILE, or "
                "go on from a text by --prompt alone"
            )
        return None
    if arguments.chat or arguments.messages or arguments.system or arguments.chat_options or name:
        return template
    if arguments.prompt == "" and not arguments.image:
        return None  # nothing is asked
    special = _special_tokens(opened)
    holds = {p.where: held[0] for p in prompts if (held := [token for token in special if token in p.text])}
    if holds:
        where, token = next(iter(holds.items()))
        if len(holds) < len(prompts):
            raise UserError(
                f"{where}: holds {token}, as a text that is a chat already, and other prompts do not; "
                "say --chat or --raw for all"
            )
        _note(f"{where} holds {token}, so it is taken as it is; --chat puts it in a turn of its own")
        return None
    _note("the model has a chat template, so the prompt is a user's turn; --raw takes it as it is")
    return template


def _others(known: Mapping[str, str]) -> str:
    return f" by the name default, but {', '.join(sorted(known))} (--chat_template NAME)" if known else ""


def _special_tokens(opened: OpenModel) -> list[str]:
    """The special tokens that a rendered prompt holds; places of images are none."""
    if opened.tokenizer is None:
        return []
    added = opened.tokenizer.get_added_tokens_decoder()
    mark = image_mark(opened)
    return [token.content for token in added.values() if token.special and token.content not in ("", mark)]


def make_answers(
    prompts: Sequence[Prompt], arguments: Arguments, opened: OpenModel, *, chat: bool
) -> list[Answer]:
    """The answers that are to be made, nothing of them yet."""
    most = opened.config.max_length
    ends, stops = find_ends(opened, chat=chat, stop=arguments.stop, past_end=arguments.past_end)
    answers = []
    for index, prompt in enumerate(prompts):
        batch = read_prompt(prompt, opened, chat=chat)
        ids = batch["tokens"][0].tolist()
        budget = min(arguments.max_new_tokens, most - len(ids))
        if not ids or budget < 1:
            raise UserError(f"{prompt.where} holds {len(ids)} tokens; the model takes 1 to {most - 1}")
        for sample in range(arguments.samples):
            text = TextStream(opened.tokenizer, ids)
            answers.append(Answer(index, sample, batch, budget, ends, text, StopTexts(stops)))
    return answers


def _note(text: str) -> None:
    warnings.warn(UserNote(text), stacklevel=2)

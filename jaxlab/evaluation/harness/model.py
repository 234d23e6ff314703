"""The adapter: what the harness asks of a model, by the functions of the task `evaluate`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxlab.checkpoints import open_model
from jaxlab.errors import UserError
from jaxlab.evaluation.answers import answer_texts
from jaxlab.evaluation.likelihood import likelihoods
from jaxlab.evaluation.prompting import find_ends
from jaxlab.models import Batch, SplitConfig, model_mesh, using
from jaxlab.processing import encode, render_chats

BYTE_END = 0
"""What ends a text where tokens are bytes."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_IGNORED = ("do_sample", "until", "max_gen_toks", "max_new_tokens", "max_tokens")


@register_model("jaxlab")
class HarnessModel(TemplateLM):
    """A language model as the harness asks for it: log-likelihoods and texts.

    Prompts are sorted by length and read in batches padded to whole lengths; one that several continuations
    follow, as in multiple choice, is read once.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str | None = None,
        fsdp: int = 1,
        model: int = 1,
        add_bos_token: bool | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
          pretrained: what `jaxlab.load_model` takes: a folder, a run, a hub id, a GGUF file, MODEL+ADAPTER.
          batch_size: prompts that are read together; `auto` is 8.
          max_length: tokens that the model reads; by default as many as it can. Of longer texts the beginning
            is left out.
          max_gen_toks: tokens of an answer, where a task does not say.
          dtype: of parameters and activations, instead of the model's own.
          fsdp, model: devices over which it is split.
          add_bos_token: whether texts begin with the tokenizer's first token; by default as it does.
          seed: of sampled answers.
          max_batch_size, device: of the harness; not used, jax takes the devices that are there.

        Raises:
          UserError: there is no such model, or it has no such length.
        """
        super().__init__()
        self.opened = open_model(pretrained)
        self.config = self.opened.config_in(dtype)
        if max_length is not None and not 1 <= max_length <= self.config.max_length:
            raise UserError(f"max_length: from 1 to {self.config.max_length}, not {max_length}")
        self.max_length = max_length or self.config.max_length
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks, self.seed, self._add_bos = max_gen_toks, seed, add_bos_token
        self.mesh = model_mesh(SplitConfig(fsdp=fsdp, model=model))
        self.params = self.opened.read(mesh=self.mesh, dtype=dtype)

    @property
    def eot_token_id(self) -> int:
        word = self.opened.special_tokens.get("eos_token")
        token = self._token(word)
        if token is None:
            token = min(self.opened.end_tokens, default=BYTE_END)
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        begin = self._token(self.opened.special_tokens.get("bos_token"))
        return self.eot_token_id if begin is None else begin

    def _token(self, word: str | None) -> int | None:
        tokenizer = self.opened.tokenizer
        return None if word is None or tokenizer is None else tokenizer.token_to_id(word)

    @property
    def tokenizer_name(self) -> str:
        return str(self.opened.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.opened.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the model's own template, in a sandbox.

        Raises:
          UserError: it has none, or the template refuses the conversation.
        """
        template = self.opened.chat_template
        if template is None:
            raise UserError(f"{self.opened.path}: has no chat template; leave --apply_chat_template out")
        [text] = render_chats(
            [chat_history],
            template,
            special_tokens=self.opened.special_tokens,
            place=f"{self.opened.path}: its chat template",
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text. A text that begins with the first token, as a chat may, gets no second one."""
        special = add_special_tokens
        if special is None:
            special = True if self._add_bos is None else self._add_bos
            begin = self.opened.special_tokens.get("bos_token")
            special = special and not (begin and string.startswith(begin))
        return encode(string, self.opened.tokenizer, special=special)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation), in tokens: the summed log-probability of the continuation,
        and whether greedy decoding would give it.

        Raises:
          UserError: a continuation that is empty, or longer than the model takes.
        """
        places: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        keys = []
        for _, context, continuation in requests:
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"a context of {len(context)} tokens and {len(continuation)} to follow; there must be "
                    f"some of each, and at most {self.max_length} to follow"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is not read
            key = tuple(context[-room:]), tuple(continuation)
            keys.append(key)
            places.setdefault(key[0], {})[key[1]] = None
        as_tokens = lambda ids: np.asarray(ids, np.int32)
        prompts: list[Batch] = [{"tokens": as_tokens(context)[None]} for context in places]
        with using(self.mesh):
            found = likelihoods(
                self.params,
                self.config,
                prompts,
                [list(map(as_tokens, following)) for following in places.values()],
                batch_size=self.batch_size,
            )
        answers = {
            (context, continuation): (float(log_p), bool(greedy))
            for (context, following), one in zip(places.items(), found, strict=True)
            for continuation, log_p, greedy in zip(following, *one, strict=True)
        }
        for (texts, _, _), key in zip(requests, keys, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[key])
        return [answers[key] for key in keys]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` tokens, each predicted once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            [text] = request.args
            of_text = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            more = [(None, *make_disjoint_window(pair)) for pair in of_text]
            windows += more
            counts.append(len(more))
        found = iter(self._loglikelihood_tokens(windows))
        sums = [float(sum(next(found)[0] for _ in range(count))) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to one of the texts of `until`, or what ends the model's texts.

        Raises:
          UserError: a prompt without room for an answer.
        """
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for members in alike.values():
            options = requests[members[0]].args[1]
            most, stops, sampling = self._options(options)
            if most >= self.max_length:
                raise UserError(
                    f"{most} tokens of an answer leave no room for a prompt in {self.max_length}; lower "
                    "max_gen_toks"
                )
            room = self.max_length - most
            prompts: list[Batch] = [
                {"tokens": np.asarray([self.tok_encode(requests[i].args[0])[-room:]], np.int32)}
                for i in members
            ]
            ends, stops = find_ends(self.opened, chat=True, stop=stops)
            with using(self.mesh):
                answers = answer_texts(
                    prompts,
                    self.params,
                    self.config,
                    self.opened.tokenizer,
                    max_new_tokens=most,
                    ends=ends,
                    stops=stops,
                    sampling=sampling,
                    key=jax.random.key(self.seed),
                    batch_size=self.batch_size,
                )
            for i, answer in zip(members, answers, strict=True):
                texts[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return texts

    def _options(self, options: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """Most tokens, texts that end an answer, and how it is sampled.

        Raises:
          UserError: options that are not known.
        """
        unknown = sorted(set(options) - {*_SAMPLING, *_IGNORED})
        if unknown:
            raise UserError(
                f"generation_kwargs: {unknown[0]} is not known; it is one of "
                f"{', '.join((*_IGNORED, *_SAMPLING))}"
            )
        most = next((options[name] for name in _IGNORED[2:] if name in options), self.max_gen_toks)
        until = options.get("until") or []
        sampled = options.get("do_sample", options.get("temperature", 0) > 0)
        sampling = {name: options[name] for name in _SAMPLING if name in options} if sampled else {}
        if sampled:
            sampling.setdefault("temperature", 1.0)
        return int(most), [until] if isinstance(until, str) else list(until), sampling

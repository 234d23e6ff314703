"""A vision-language model put together: a language model, a vision tower, a projector that is new."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer

from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.formats.hf_write import hf_family
from jaxlab.checkpoints.tensor_folder import read_json
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, ViTConfig, abstract_params, init_params

FAMILIES = ("llava", "idefics3")
_MARKS = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """A new vision tower: SigLIP's transformer, of any size."""

    image_size: int = 64
    """Height and width that images are resized to."""
    patch_size: int = 8
    """Pixels a side of a patch."""
    num_layers: int = 6
    """Layers."""
    width: int = 192
    """Width."""
    num_heads: int = 3
    """Attention heads."""
    mlp_width: int = 768
    """Hidden width of its MLPs."""
    shuffle: int = 2
    """Of family idefics3: squares of so many patches a side become one token."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 1 <= getattr(self, field.name) < 1 << 20:
                raise ConfigError(f"must be at least 1, is {getattr(self, field.name)}", key=field.name)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
                key="patch_size",
            )


class Assembly(NamedTuple):
    """What the model will be, before a tensor is read."""

    config: ModelConfig
    tokenizer: Tokenizer
    files: dict[str, str]
    """Texts of the files beside the tensors."""
    added: tuple[str, ...]
    """Words that the tokenizer got."""


def plan_vlm(
    language: OpenModel,
    *,
    family: Literal["llava", "idefics3"],
    tower: TowerConfig,
    tower_of: OpenModel | None = None,
) -> Assembly:
    """The vision-language model of a language model and a tower.

    The tokens that stand for and around images are added to the tokenizer where it lacks them.

    Args:
      family: in whose form it is, with a new tower.
      tower: the new tower.
      tower_of: a vision-language model whose tower, and form, is taken instead.

    Raises:
      UserError: they cannot be one model.
    """
    if language.config.has_vision:
        raise UserError(f"{language.path}: a vision-language model; name a language model")
    if language.tokenizer is None:
        raise UserError(f"{language.path}: has no tokenizer, whose tokens would place images")
    text_family = hf_family(language.config).partition("/")[0]
    vision: Any
    if tower_of is None:
        words = _WORDS[family]
        vision = _new_tower(family, tower)
        name, files = f"{family}+{text_family}", _processor_files(family, tower, vision)
    else:
        if tower_of.config.vision is None:
            raise UserError(f"{tower_of.path}: has no vision tower")
        part = tower_of.processor.text
        words = tuple(
            dict.fromkeys([part.tokens["image"].text, *(token.text for token in part.tokens.values())])
        )
        vision = tower_of.config.vision
        base = tower_of.config.family.partition("/")[0].partition("@")[0].partition("+")[0]
        name, files = f"{base}+{text_family}", _files_of(tower_of.companion_folder)
    tokenizer, ids, added = _with_words(language.tokenizer, words)
    size = max(language.config.vocab_size, max(ids) + 1)
    try:
        config = dataclasses.replace(
            language.config,
            family=name,
            vocab_size=size,
            vision=dataclasses.replace(vision, image_token=ids[0]),
        )
    except ConfigError as error:
        raise UserError(f"no such model can be: {error}") from error
    hf_family(config)  # refuses what the form cannot say
    return Assembly(config, tokenizer, {**files, **_text_files(language, tokenizer, words)}, added)


def assemble(plan: Assembly, language: OpenModel, tower_of: OpenModel | None, seed: int) -> Params:
    """The parameters: the language model's, rows for new tokens that are the mean of the others, the tower's
    or random ones, and a random projector; in the language model's dtype.

    Raises:
      UserError: tensors that are damaged.
    """
    theirs = language.read()
    dtype = jax.tree.leaves(theirs)[0].dtype
    new = jax.jit(functools.partial(init_params, plan.config))(jax.random.key(seed))
    params = {name: jax.tree.map(lambda x: x.astype(dtype), new[name]) for name in ("vision", "projector")}
    if tower_of is not None:
        params["vision"] = jax.tree.map(lambda x: x.astype(dtype), tower_of.read()["vision"])
    params |= theirs
    extra = plan.config.vocab_size - language.config.vocab_size
    if extra:

        def grow(table: jax.Array, axis: int) -> jax.Array:
            mean = jnp.mean(table, axis, keepdims=True, dtype=jnp.float32).astype(dtype)
            return jnp.concatenate([table, jnp.repeat(mean, extra, axis)], axis)

        params["embedding"] = {"table": grow(theirs["embedding"]["table"], 0)}
        if "head" in theirs:
            params["head"] = {"table": grow(theirs["head"]["table"], 1)}
            if "bias" in theirs["head"]:
                params["head"]["bias"] = grow(theirs["head"]["bias"], 0)
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(plan.config))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    return params


_WORDS: Mapping[str, tuple[str, ...]] = {
    "llava": ("<image>",),
    "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>"),
}


def _new_tower(family: str, t: TowerConfig) -> ViTConfig:
    sizes: dict[str, Any] = {
        "image_size": t.image_size,
        "patch_size": t.patch_size,
        "channels": 3,
        "num_layers": t.num_layers,
        "width": t.width,
        "num_heads": t.num_heads,
        "mlp_width": t.mlp_width,
    }
    try:
        if family == "llava":  # as LLaVA has SigLIP: the features before the last norm
            return ViTConfig(**sizes, final_norm="unused", feature_layers=(-1,))
        return ViTConfig(
            **sizes, position="fractional", connector="linear", connector_bias=False, shuffle=t.shuffle
        )
    except ConfigError as error:
        raise UserError(f"tower.{error}") from error


def _processor_files(family: str, t: TowerConfig, vision: ViTConfig) -> dict[str, str]:
    pixels: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if family == "llava":
        size = {"height": t.image_size, "width": t.image_size}
        pixels |= {"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": size}
        around: dict[str, Any] = {
            "processor_class": "LlavaProcessor",
            "patch_size": t.patch_size,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "image_token": "<image>",
        }
    else:
        edge = {"longest_edge": t.image_size}
        pixels |= {
            "image_processor_type": "Idefics3ImageProcessor",
            "resample": 1,
            "size": edge,
            "max_image_size": edge,
            "do_image_splitting": False,
            "do_pad": True,
        }
        tokens = vision.features(t.image_size // t.patch_size) // vision.shuffle**2
        around = {"processor_class": "Idefics3Processor", "image_seq_len": tokens}
    pixels["processor_class"] = around["processor_class"]
    return {"preprocessor_config.json": _json(pixels), "processor_config.json": _json(around)}


def _files_of(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text("utf-8") for name in _MARKS if (folder / name).is_file()}


def _with_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[Tokenizer, list[int], tuple[str, ...]]:
    copy = Tokenizer.from_str(tokenizer.to_str())
    missing = tuple(word for word in words if copy.token_to_id(word) is None)
    copy.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in missing])
    ids = {word: copy.token_to_id(word) for word in words}
    return copy, [number for number in ids.values() if number is not None], missing


def _text_files(language: OpenModel, tokenizer: Tokenizer, words: tuple[str, ...]) -> dict[str, str]:
    """What goes with the tokenizer: its special tokens by name, a chat template that takes images, and how
    texts end."""
    special = dict(language.special_tokens)
    names = (words[0], tokenizer, special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if name != "image_token"},
        "extra_special_tokens": {"image_token": words[0]},
    }
    source = language.source_files
    if source is not None and source.folder is not None:
        told = source.folder / "tokenizer_config.json"
        if told.is_file():
            kept = read_json(told)
            for key in ("chat_template", "added_tokens_decoder", "additional_special_tokens"):
                kept.pop(key, None)
            config = {**kept, **config}
    files = {
        "tokenizer_config.json": _json(config),
        "chat_template.jinja": _template(*names),
    }
    generation = dict(language.generation) or (
        {"eos_token_id": sorted(language.end_tokens)} if language.end_tokens else {}
    )
    if generation:
        files["generation_config.json"] = _json(generation)
    return files


def _template(image: str, tokenizer: Tokenizer, special: Mapping[str, str]) -> str:
    """ChatML where the tokenizer has its tokens, else names of who speaks; contents are texts or parts."""
    content = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    if all(tokenizer.token_to_id(word) is not None for word in ("<|im_start|>", "<|im_end|>")):
        start = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        end, ask = "{{ '<|im_end|>\\n' }}", "{{ '<|im_start|>assistant\\n' }}"
    else:
        start = "{{ message['role'] | capitalize + ':\\n' }}"
        closing = "eos_token" if special.get("eos_token") else "''"
        end = "{% if message['role'] == 'assistant' %}{{ " + closing + " }}{% endif %}{{ '\\n' }}"
        ask = "{{ 'Assistant:\\n' }}"
    return (
        "{% for message in messages %}" + start + content + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + ask + "{% endif %}"
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

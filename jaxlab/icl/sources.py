"""From the config of prompts to the prompts, in the tokens of a model."""

from jaxlab.checkpoints import OpenModel
from jaxlab.data import DigitsConfig, DigitsSource, EpisodesConfig, EpisodesSource
from jaxlab.errors import UserError
from jaxlab.icl.digit_prompts import DigitPrompts
from jaxlab.icl.episode_prompts import EpisodePrompts
from jaxlab.icl.few_shot import FewShotPrompts, LabelPosition, Mode, Split
from jaxlab.icl.image_prompts import NAMES, ImagePrompts, ImagePromptsConfig, image_prompts_identity
from jaxlab.icl.prompts import PromptSource
from jaxlab.icl.roles import TokenClasses
from jaxlab.icl.text_tasks import (
    AGNewsConfig,
    ClassificationConfig,
    EmoCConfig,
    SST2Config,
    TRECConfig,
    examples_identity,
)

TextTaskConfig = ClassificationConfig | SST2Config | TRECConfig | AGNewsConfig | EmoCConfig
PromptsConfig = EpisodesConfig | DigitsConfig | TextTaskConfig | ImagePromptsConfig
"""The prompts that are analysed; a further source joins by `|`."""


def prompts_identity(config: PromptsConfig) -> str:
    """A digest of what the prompts are made from; it changes when that does.

    Raises:
      UserError: files are missing.
    """
    if isinstance(config, EpisodesConfig):
        return EpisodesSource(config).identity
    if isinstance(config, DigitsConfig):
        return DigitsSource(config).identity
    if isinstance(config, ImagePromptsConfig):
        return image_prompts_identity(config)
    return examples_identity(config)


def make_prompts(
    config: PromptsConfig,
    opened: OpenModel,
    *,
    split: Split = "test",
    mode: Mode = "paper",
    classes: TokenClasses | None = None,
    label_position: LabelPosition = "first",
) -> PromptSource:
    """The prompts that `config` describes, for one model.

    Raises:
      UserError: files that are missing or damaged, or prompts that are not for this model.
    """
    if isinstance(config, DigitsConfig | ImagePromptsConfig):
        _refuse_options_of_texts(config, split, classes or TokenClasses(), label_position)
    if isinstance(config, EpisodesConfig):
        return EpisodePrompts(config, opened, split, classes)
    if isinstance(config, DigitsConfig):
        return DigitPrompts(config, opened, split)
    if isinstance(config, ImagePromptsConfig):
        return ImagePrompts(config, opened)
    return FewShotPrompts(
        config, opened, split=split, mode=mode, classes=classes, label_position=label_position
    )


def _refuse_options_of_texts(
    config: DigitsConfig | ImagePromptsConfig, split: Split, classes: TokenClasses, label_position: str
) -> None:
    """Refuse what would say nothing of prompts whose classes are system, image, instruction and answer.

    Raises:
      UserError: with the option.
    """
    given = {
        "label_classes": classes.label_words != "together",
        "sink": classes.sink,
        "forerunners": classes.forerunners,
        "label_position": label_position != "first",
    }
    for name in (name for name, is_set in given.items() if is_set):
        raise UserError(
            f"{name}: is of prompts with label words; those of data.kind {config.kind} have the classes "
            f"{', '.join(NAMES)}; leave it out"
        )
    if isinstance(config, ImagePromptsConfig) and split != "test":
        raise UserError(
            f"split: data of kind images has one table; leave it out, or set it to test, not {split}"
        )

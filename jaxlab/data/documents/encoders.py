"""What makes tokens of the data sets of a config, by the model that it names."""

from pathlib import Path

from tokenizers import Tokenizer

from jaxlab.checkpoints import OpenModel, describe_model
from jaxlab.data.documents.chats import ChatEncoder
from jaxlab.data.documents.config import DataSet, DocumentsConfig
from jaxlab.data.documents.document import Encoder
from jaxlab.data.documents.texts import TextEncoder
from jaxlab.data.text import FindModel
from jaxlab.errors import ConfigError, UserError

BYTE_END = 0
"""The byte after a text where tokens are bytes; no text may hold it."""


class Encoders:
    """What makes tokens of the data sets of a config."""

    def __init__(self, config: DocumentsConfig, find_model: FindModel) -> None:
        """Opens the model whose tokenizer is named.

        Raises:
          UserError: it has none, or no token that ends a text, or no chat template where one is needed.
        """
        model = None if config.tokenizer is None else describe_model(find_model(config.tokenizer))
        self.tokenizer = None if model is None else model.tokenizer
        if model is not None and self.tokenizer is None:
            raise UserError(
                f"{config.tokenizer}: has no tokenizer; name another model, or leave data.tokenizer out"
            )
        self.end_word: str | None = None
        self._text: Encoder | None = None
        self._chat: Encoder | None = None
        if any(d.content == "text" for d in config.all_sets):
            end = BYTE_END
            if model is not None and self.tokenizer is not None:
                self.end_word, end = _end_token(config, model, self.tokenizer)
            self._text = TextEncoder(self.tokenizer, end)
        if any(d.content == "chat" for d in config.all_sets):
            assert model is not None
            assert self.tokenizer is not None
            template, place = _template(config, model)
            self._chat = ChatEncoder(
                self.tokenizer,
                template,
                special_tokens=model.special_tokens,
                train_on=config.train_on,
                place=place,
            )

    def of(self, data: DataSet) -> Encoder:
        """The encoder of a data set."""
        found = self._chat if data.content == "chat" else self._text
        assert found is not None
        return found


def _end_token(config: DocumentsConfig, model: OpenModel, tokenizer: Tokenizer) -> tuple[str, int]:
    """The token after each text, and its id.

    Raises:
      UserError: none is known.
    """
    word = config.end_of_text
    if word is None:
        word = model.special_tokens.get("eos_token")
        if word is None and len(model.end_tokens) == 1:
            word = tokenizer.id_to_token(next(iter(model.end_tokens)))
    if word is None:
        raise UserError(
            f"{config.tokenizer}: the model names no token that ends a text; set data.end_of_text to one"
        )
    found = tokenizer.token_to_id(word)
    if found is None:
        raise UserError(f"data.end_of_text: the tokenizer of {config.tokenizer} has no token {word!r}")
    return word, int(found)


def _template(config: DocumentsConfig, model: OpenModel) -> tuple[str, str]:
    """The chat template and whose it is.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if config.chat_template is None:
        if model.chat_template is None:
            raise UserError(f"{config.tokenizer}: has no chat template; name a file by data.chat_template")
        return model.chat_template, f"{config.tokenizer}: chat template"
    path = Path(config.chat_template)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", key="data.chat_template") from error
    except ValueError:
        raise ConfigError(f"{path}: not valid UTF-8", key="data.chat_template") from None

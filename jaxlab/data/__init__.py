"""Where batches come from: pure functions of (seed, step), so that a resumed run reads the same ones."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.data.digits import DigitsConfig, DigitsSource, evaluation_batches, naming_places
    from jaxlab.data.digits_words import PAD_ID, digits_tokenizer
    from jaxlab.data.documents.config import DataSet, DocumentsConfig
    from jaxlab.data.documents.source import DocumentsSource
    from jaxlab.data.episodes import EpisodesConfig, EpisodesSource, TokenClass, episode_tokenizer
    from jaxlab.data.episodes import make_batch as make_episodes
    from jaxlab.data.facts import Fact, draw_facts
    from jaxlab.data.image_chats import ImageChatsConfig, ImageChatsSource
    from jaxlab.data.needle import NeedleConfig, NeedleSource
    from jaxlab.data.needle_text import NeedleTextConfig, NeedleTextSource
    from jaxlab.data.read_ahead import BatchReader
    from jaxlab.data.source import (
        DataConfig,
        Source,
        batch_shapes,
        check_all_tokens,
        check_fits,
        check_same_words,
        first_held_out,
        make_source,
    )
    from jaxlab.data.tables import Row, TableFormat, is_dataset, read_dataset, read_table
    from jaxlab.data.text import FindModel, TextConfig, TextSource

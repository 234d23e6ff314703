"""Images from files through each family's own preprocessing, and the text around them."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.processing.chat import Message, check_messages, render_chat, render_chats
    from jaxlab.processing.processor import Processor, load_processor
    from jaxlab.processing.tokens import (
        TextStream,
        check_token_ids,
        decode,
        encode,
        encode_batch,
        make_tokenizer,
    )

"""Images from files through each family's own preprocessing, and the text around them.

A family of models names its processor (`Family.processor`): one of those below, or one that it makes of an
ImageKind and a TextPart of its own.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.processing.anyres import LLAVA_NEXT, LLAVA_ONEVISION
    from jaxlab.processing.base import ImageKind, ImagePart, One, ProcessorKind, TextPart, Token
    from jaxlab.processing.chat import (
        Conversation,
        Message,
        Turns,
        as_conversation,
        as_texts,
        render_chat,
        render_chats,
        render_turns,
    )
    from jaxlab.processing.gemma3 import GEMMA3
    from jaxlab.processing.idefics2 import IDEFICS2
    from jaxlab.processing.idefics3 import IDEFICS3, SMOLVLM
    from jaxlab.processing.mllama import MLLAMA
    from jaxlab.processing.pixtral import PIXTRAL
    from jaxlab.processing.processor import Placed, Processor, load_processor
    from jaxlab.processing.prompt_files import Prompt, read_json_lines, read_messages, read_prompts
    from jaxlab.processing.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
    from jaxlab.processing.settings import ProcessorSettings
    from jaxlab.processing.square import LLAVA, PALIGEMMA
    from jaxlab.processing.stop_texts import StopTexts
    from jaxlab.processing.tiles import INTERNVL, INTERNVL_CHAT
    from jaxlab.processing.tokens import (
        Encoded,
        TextStream,
        check_token_ids,
        decode,
        encode,
        encode_batch,
        encode_with_spans,
        make_tokenizer,
    )

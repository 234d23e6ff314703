"""In-context learning, looked at from inside: information flows, and what blocking them does."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.icl.blocking import (
        Setting,
        blocked_logits,
        blocking_settings,
        label_predictions,
        random_words,
        word_loyalty,
    )
    from jaxlab.icl.prompts import Prompts, PromptsConfig, PromptSource, Roles, make_prompts, token_texts
    from jaxlab.icl.saliency import NsaEdges, Reduction, flow_memory, flow_shares, flows, saliency_maps

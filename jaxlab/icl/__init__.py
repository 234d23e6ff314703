"""In-context learning, looked at from inside: information flows, and what blocking them does.

`analyses/README.md` tells how an analysis is added; each is a module there and a mode of `run.py icl`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.icl.analyses.answers import Answers
    from jaxlab.icl.analyses.attention import Attention
    from jaxlab.icl.analyses.base import Analysis, Records, Study
    from jaxlab.icl.analyses.baselines import Baselines
    from jaxlab.icl.analyses.blocking import Blocking
    from jaxlab.icl.analyses.compression import Compression
    from jaxlab.icl.analyses.diagnosis import Diagnosis
    from jaxlab.icl.analyses.faithfulness import Faithfulness
    from jaxlab.icl.analyses.flow_shares import FlowShares
    from jaxlab.icl.analyses.heads import Heads
    from jaxlab.icl.analyses.many_shot import ManyShot
    from jaxlab.icl.analyses.picture import Picture
    from jaxlab.icl.analyses.records import ChunkStore, run_analysis
    from jaxlab.icl.analyses.reweighting import Reweighting
    from jaxlab.icl.blocking import (
        Setting,
        blocked_logits,
        blocking_settings,
        label_predictions,
        random_words,
        word_loyalty,
    )
    from jaxlab.icl.cutting import cut_logits
    from jaxlab.icl.episode_prompts import EpisodePrompts
    from jaxlab.icl.few_shot import FewShotPrompts, LabelPosition, Mode, Split
    from jaxlab.icl.image_prompts import ImagePrompts, ImagePromptsConfig
    from jaxlab.icl.label_attention import attention_at, aucroc, label_places
    from jaxlab.icl.packed_maps import pack_maps, unpack_maps
    from jaxlab.icl.prompts import Prompts, PromptSource, token_texts
    from jaxlab.icl.reweighting import Lesson, learn_anchor_weights, reweighted_logits
    from jaxlab.icl.roles import LabelWordClasses, Part, Roles, TokenClasses
    from jaxlab.icl.saliency import NsaEdges, Reduction, flow_memory, flow_shares, flows, saliency_maps
    from jaxlab.icl.sources import PromptsConfig, make_prompts, prompts_identity
    from jaxlab.icl.text_tasks import (
        AGNewsConfig,
        ClassificationConfig,
        EmoCConfig,
        Examples,
        ExamplesConfig,
        SST2Config,
        TRECConfig,
        read_examples,
    )

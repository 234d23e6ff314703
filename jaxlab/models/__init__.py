"""One decoder, with or without vision: modules that compute, and pure functions on one parameter pytree."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.models.batch import OF_TOKENS, Batch, Params, check_tokens, shapes_of, stack_rows
    from jaxlab.models.block import Block
    from jaxlab.models.compressor import linear_mean_compressor, mean_compressor
    from jaxlab.models.config import (
        BRANCHES,
        H2O,
        AttentionConfig,
        ExactBlocks,
        ExactTokens,
        FullAttentionConfig,
        InfLLM,
        LatentConfig,
        LayerKind,
        LearnedPositions,
        MllamaVisionConfig,
        ModelConfig,
        MoEConfig,
        NoPositions,
        NSAConfig,
        PlainVisionConfig,
        PositionConfig,
        Quest,
        QwenVisionConfig,
        ResamplerConfig,
        RopeConfig,
        SlidingAttentionConfig,
        SparsityConfig,
        VisionConfig,
        ViTConfig,
    )
    from jaxlab.models.config.flat import from_flat, is_flat
    from jaxlab.models.context import AttentionContext
    from jaxlab.models.decoder import Decoder, as_arrays, bind_decoder, forward, language_model, positions_of
    from jaxlab.models.generation import decode_step, generate, prefill, stream
    from jaxlab.models.initializer import bind
    from jaxlab.models.interpretability import activations
    from jaxlab.models.kv_cache import Cache, init_cache
    from jaxlab.models.low_rank import LowRank, is_low_rank, merge_updates
    from jaxlab.models.mesh import (
        BATCH,
        CONTEXT,
        HEADS,
        check_length,
        in_parts,
        split_tokens,
        vocabulary_is_split,
    )
    from jaxlab.models.output import Output
    from jaxlab.models.parameters import (
        abstract_params,
        cast_floats,
        count_params,
        init_params,
        logical_axes,
    )
    from jaxlab.models.rotary import rope_tables, rotary_table, rotate
    from jaxlab.models.sampling import LEAST_TEMPERATURE, Sampling
    from jaxlab.models.scoring import continuation_log_probs
    from jaxlab.models.sharding import (
        MeshConfig,
        SplitConfig,
        batch_shardings,
        check_batch,
        make_mesh,
        mesh_of,
        model_mesh,
        on_mesh,
        param_shardings,
        place_batch,
        rows_here,
        shardings_by_axes,
        to_host,
        using,
    )
    from jaxlab.models.stack import MadeLayers
    from jaxlab.models.taps import ACTIVATIONS, Patch, activation_names
    from jaxlab.models.vision.encoders import encode_images, prepare_batch
    from kernels_pallas.flow import Probe

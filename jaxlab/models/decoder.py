"""The forward pass: one pure function for every language model and vision-language model."""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.batch import Batch, Params
from jaxlab.models.block import Block
from jaxlab.models.config import LearnedPositions, ModelConfig, ViTConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.initializer import Initializer, bind
from jaxlab.models.kv_cache import Cache
from jaxlab.models.layers import Embedding, layer_norm, project, softcap
from jaxlab.models.mesh import reorder, split_tokens, split_words, stretches_of
from jaxlab.models.output import Output
from jaxlab.models.rotary import rope_tables
from jaxlab.models.stack import NO_BETWEEN, Between, MadeLayers, apply_blocks
from jaxlab.models.taps import NO_TAPS, Patch, Taps, make_taps
from jaxlab.models.vision.encoder import Encoded
from jaxlab.models.vision.encoders import encode_images, layers_between, prepare_batch
from jaxlab.models.vision.placeholders import place_images, scatter_deep
from kernels_pallas.flow import Probe


def forward(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    probe: Probe | None = None,
    patches: Sequence[Patch] = (),
    cache: Cache | None = None,
    made: MadeLayers | None = None,
    logit_positions: Int[Array | np.ndarray, "B P"] | None = None,
    logit_tokens: Int[Array | np.ndarray, "B C"] | None = None,
) -> Output:
    """Next-token logits of a batch, and what else the model computed.

    It unpacks: `logits, intermediates = forward(params, batch, config)`.

    Args:
      params: a plain nested dict, as `init_params` makes it.
      probe: streams flows out of attention, reads or changes its weights (kernels_pallas/flow).
      patches: changes of named activations (see taps.py); with a cache of head_output alone, whose
        positions then count from the cache's end on.
      cache: what the tokens continue (segment_ids then mark padding at the right end only).
      made: makes each layer's parameters where it runs (see `MadeLayers`).
      logit_positions: the tokens of each row whose logits (and hidden) come back, [B, P, ...]; None: all. The
        logits of the others are never built.
      logit_tokens: the words of each row whose logits come back, [B, P, C]; None: the vocabulary, [B, P, V].

    Raises:
      ValueError: images for a model without vision, tokens (where they are not traced) that the embedding
        has no row for, a text longer than a table of learned positions, other patches than of head_output,
        another probe than of factors or an attention_mask together with a cache, positions that are given
        together with a cache of NSA, which counts its blocks itself, patches of what is not there,
        logit_positions or logit_tokens together with patches of what comes after the last layer, or
        parameters that are not those of the config.
    """
    if "images" in batch and not config.has_vision:
        raise ValueError("the batch holds images, the model has no vision")
    if cache is not None and any(patch.name != "head_output" for patch in patches):
        raise ValueError("patches other than of head_output cannot be used with a cache")
    if cache is not None and probe is not None and not probe.continues:
        raise ValueError("with a cache a probe has factors, classes and slot_classes, and nothing else")
    if cache is not None and config.attention.kind == "nsa" and "positions" in batch:
        raise ValueError("NSA's cache counts positions itself; leave them out of the batch")
    if cache is not None and "attention_mask" in batch:
        raise ValueError("with a cache padding stands at the right end; say it by segment_ids")
    after = [patch.name for patch in patches if patch.name in ("final_hidden", "logits")]
    if (logit_positions is not None or logit_tokens is not None) and after:
        raise ValueError(
            f"a patch of {after[0]} is of all tokens; leave logit_positions and logit_tokens out"
        )
    batch = as_arrays(prepare_batch(batch, config))
    taps = NO_TAPS
    if probe is not None or patches:
        taps = make_taps(batch, config, patches=patches, probe=probe)
    images = encode_images(params, batch, config, cache)
    between = layers_between(params, images, config)
    decoder = bind_decoder(params, config)
    return decoder(
        batch,
        images=images,
        between=between,
        taps=taps,
        cache=cache,
        made=made,
        logit_positions=logit_positions,
        logit_tokens=logit_tokens,
    )


def bind_decoder(params: Params, config: ModelConfig) -> "Decoder":
    """The decoder of a model with its parameters; those of a vision tower are left aside.

    Raises:
      ValueError: parameters that are not those of the config.
    """
    return bind(language_model(params), Decoder, config)


def language_model(params: Params) -> Params:
    """The language model of a VLM: its tree without `vision` and `projector`."""
    return {name: tree for name, tree in params.items() if name not in ("vision", "projector")}


def as_arrays(batch: Batch) -> Batch:
    """The batch with every value on the device."""
    return cast(Batch, {name: jnp.asarray(value) for name, value in batch.items()})


class Head(nnx.Module):
    """From the model's width to logits, where the embedding is not used for it."""

    def __init__(self, config: ModelConfig, init: Initializer):
        c = config
        self.table = init.normal((c.width, c.vocab_size), ("embed", "vocab"), c.initializer_range)
        self.bias = init.zeros((c.vocab_size,), ("vocab",)) if c.head_bias else None


class Decoder(nnx.Module):
    """Embeddings, blocks, a norm and logits."""

    def __init__(self, config: ModelConfig, init: Initializer):
        c, std = config, config.initializer_range
        self.config = c
        self.embedding = Embedding(c.embedding_rows, c.width, "vocab", std, init)
        learned = c.position if isinstance(c.position, LearnedPositions) else None
        rows = 0 if learned is None else learned.offset + c.max_length
        self.position = Embedding(rows, c.width, "position", std, init) if learned is not None else None
        self.final_norm = layer_norm(c, init)
        self.head = None if c.tie_embeddings else Head(c, init)
        # Stacked on a leading axis L; those with an MLP before others with experts stand apart.
        dense = lambda init: Block(c, init, experts=False)
        self.dense_layers = init.stack(dense, c.dense_layers, fold=c.num_layers) if c.dense_layers else None
        self.layers = init.stack(lambda init: Block(c, init), c.num_layers - c.dense_layers)

    def __call__(
        self,
        batch: Batch,
        *,
        images: Encoded | None = None,
        between: Between = NO_BETWEEN,
        taps: Taps = NO_TAPS,
        cache: Cache | None = None,
        made: MadeLayers | None = None,
        logit_positions: Int[Array | np.ndarray, "B P"] | None = None,
        logit_tokens: Int[Array | np.ndarray, "B C"] | None = None,
    ) -> Output:
        """The output for a prepared batch, its images encoded; arguments as those of `forward`."""
        x, context, additions = self.embed(batch, images, cache)
        tap = taps.around()
        x = tap("embedding", x)
        plain = taps is NO_TAPS and cache is None and additions is None and between is NO_BETWEEN
        if plain and (stretches := self._stretches(x.shape[1])) > 1:
            turned = jax.tree.map(reorder, (context.rotary, context.local_rotary, context.real))
            x = reorder(split_tokens(x))
            context = context._replace(
                rotary=turned[0], local_rotary=turned[1], real=turned[2], stretches=stretches
            )
        done = apply_blocks(
            self.stacks,
            x,
            context,
            self.config,
            taps=taps,
            cache=cache,
            additions=additions,
            between=between,
            made=made,
        )
        x, chosen_blocks = done.x, done.chosen_blocks
        if context.stretches > 1:
            x = reorder(x, back=True)
            if chosen_blocks is not None:
                chosen_blocks = _in_order(chosen_blocks)
        x = split_tokens(x)
        if logit_positions is not None:
            x = jnp.take_along_axis(x, jnp.asarray(logit_positions)[:, :, None], axis=1)
        hidden = tap("final_hidden", self.final_norm(x))
        logits = tap("logits", self.logits(hidden, logit_tokens))
        new_cache = None
        if cache is not None and done.caches is not None:
            read = real_tokens(batch)
            length = cache.length + read
            offset = cache.offset
            if "positions" in batch:
                offset = _next_position(batch, context, cache) - length
            cross = None if images is None or images.cross is None else images.cross.of_next(read)
            new_cache = Cache(done.caches, length, offset, cross)
        return Output(
            logits,
            hidden,
            cache=new_cache,
            chosen_blocks=chosen_blocks,
            weights_read=done.weights_read,
            selector_loss=done.selector_loss,
            **({} if done.experts is None else done.experts._asdict()),
            activations=(done.activations | tap.found) or None,
        )

    def _stretches(self, length: int) -> int:
        """How many stretches of a sequence each device has, on the mesh that is set."""
        c, unit, least = self.config, 1, 1
        if c.sparsity is not None:
            return 1
        if c.attention.kind == "nsa":
            if c.nsa.selector != "compressed":  # others choose from keys in order, outside of parts
                return 1
            unit, least = c.nsa.stride, c.nsa.block_len - c.nsa.stride
        if c.moe is not None and c.moe.capacity_factor is not None:
            unit = math.lcm(unit, c.moe.capacity_group or length)
        return stretches_of(length, unit=unit, least=least)

    @property
    def stacks(self) -> tuple[Block, ...]:
        """The stacked blocks, the first ones first."""
        return (self.layers,) if self.dense_layers is None else (self.dense_layers, self.layers)

    def embed(
        self, batch: Batch, images: Encoded | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], AttentionContext, Float[Array, "n B T D"] | None]:
        """What the first layer reads of a prepared batch, what attention needs to know of its tokens, and
        what is added to the outputs of the first n layers (DeepStack)."""
        c, tokens = self.config, batch["tokens"]
        context = attention_context(batch, c, cache)
        x = self.embedding(tokens, c.compute_dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        additions = None
        if images is not None and images.tokens is not None:
            x = place_images(x, tokens, images.tokens, c.image_token)
            if images.deep is not None:
                additions = scatter_deep(images.deep, tokens, c.image_token)
        if isinstance(c.position, LearnedPositions):
            assert self.position is not None
            row = context.positions + c.position.offset if c.position.offset else context.positions
            x = x + self.position(row, x.dtype)
        return x, context, additions

    def logits(
        self, hidden: Float[Array, "B T D"], tokens: Int[Array | np.ndarray, "B C"] | None = None
    ) -> Float[Array, "B T V_"]:
        """Of the next token, float32, of a normed residual stream: of some `tokens`, or of all."""
        bias = None if self.head is None or self.head.bias is None else self.head.bias.astype(jnp.float32)
        if tokens is None:
            head = self.embedding.table[...].T if self.head is None else self.head.table[...]
            equation, bias = "", None if bias is None else bias[None, None]
        else:
            index = jnp.asarray(tokens)
            if self.head is None:
                head, equation = self.embedding.table[...][index], "btd,bvd->btv"
            else:
                head, equation = jnp.take(self.head.table[...], index, axis=1), "btd,dbv->btv"
            bias = None if bias is None else bias[index][:, None]
        head = head.astype(hidden.dtype)
        if tokens is None:
            logits = split_words(project(hidden, head, dtype=jnp.float32))
        else:
            logits = jnp.einsum(equation, hidden, head, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return softcap(logits, self.config.logit_softcap)


def _in_order(chosen_blocks: Int[Array, "L B Hkv T n"]) -> Int[Array, "L B Hkv T n"]:
    """Blocks that were chosen for tokens in a zigzag, in the order of the tokens."""
    by_tokens = jnp.moveaxis(chosen_blocks, (0, 3), (2, 1))  # [B, T, L, Hkv, n]
    return jnp.moveaxis(reorder(by_tokens, back=True), (2, 1), (0, 3))


def attention_context(batch: Batch, config: ModelConfig, cache: Cache | None = None) -> AttentionContext:
    """Positions of a prepared batch, which go on from the cache, and who may see whom."""
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    slots = None
    if cache is not None:
        slots = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if "positions" in batch:
        positions = batch["positions"]
        if cache is not None:
            start = cache.length + cache.offset
            positions = positions + start.reshape(-1, *[1] * (positions.ndim - 1))
    elif cache is not None and slots is not None:
        positions = slots + cache.offset[:, None]
    else:
        positions = positions_of(tokens, segment_ids)
    rotary, local_rotary = rope_tables(positions, config)
    return AttentionContext(
        positions,
        segment_ids,
        slots,
        batch.get("together"),
        rotary=rotary,
        local_rotary=local_rotary,
        real=None if config.moe is None or segment_ids is None else segment_ids != 0,
        together_in_window=isinstance(config.vision, ViTConfig) and config.vision.together == "images",
    )


def _next_position(batch: Batch, context: AttentionContext, cache: Cache) -> Int[Array, " B"]:
    """One more than the last position of each row's tokens, whatever coordinate it is of; a row that adds no
    token to the cache stays where it was."""
    positions: Any = context.positions
    if positions.ndim == 3:
        positions = jnp.max(positions, axis=-1)
    if "segment_ids" in batch:
        positions = jnp.where(batch["segment_ids"] != 0, positions, -1)
    return jnp.maximum(jnp.max(positions, axis=1) + 1, cache.length + cache.offset)


def real_tokens(batch: Batch) -> Int[Array, " B"]:
    """How many tokens of each row are no padding, which stands at its end."""
    tokens = batch["tokens"]
    if "segment_ids" not in batch:
        return jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    return jnp.sum(batch["segment_ids"] != 0, axis=1, dtype=jnp.int32)


def positions_of(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Position of each token in its own segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segment_ids is None:
        return index
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.concatenate([jnp.zeros_like(index[:, :1]), jnp.where(changed, index[:, 1:], 0)], axis=1)
    return index - jax.lax.cummax(starts, axis=1)

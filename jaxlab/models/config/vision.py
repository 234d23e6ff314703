"""What the vision tower of a model is, and how its patches become tokens of the decoder."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True)
class _Tower:
    num_layers: int = 1
    """Layers of the vision transformer."""
    patch_size: int = 2
    """Height and width of a patch in pixels; each patch becomes one token."""
    channels: int = 1
    """Colour channels."""
    width: int = 64
    """Width of the vision transformer."""
    num_heads: int = 4
    """Attention heads of the vision transformer."""
    mlp_width: int = 256
    """Hidden width of its MLP."""
    image_token: int = 0
    """Token id that stands in the text where a patch goes."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "patch_size", "channels", "width", "num_heads", "mlp_width")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.width % self.num_heads:
            raise ConfigError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}", key="num_heads"
            )


@dataclass(frozen=True)
class _SquareTower(_Tower):
    image_size: int = 8
    """Height and width of an image in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1:
            raise ConfigError(f"must be at least 1, is {self.image_size}", key="image_size")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class PlainVisionConfig(_SquareTower):
    """Square patches of images of one size, and a projector of two layers."""

    kind: Literal["plain"] = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
                key="patch_size",
            )


@dataclass(frozen=True)
class ResamplerConfig:
    """Learned queries that read an image (the Perceiver of Idefics2)."""

    num_queries: int = 64
    """Learned queries, the tokens of an image."""
    num_layers: int = 3
    """Layers."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads."""
    head_dim: int = 96
    """Dimension of a head."""
    norm_eps: float = 1e-6
    """Added to the variance in its norms."""

    def __post_init__(self) -> None:
        for name in ("num_queries", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if not 0 < self.norm_eps < float("inf"):
            raise ConfigError(f"must be positive and finite, is {self.norm_eps}", key="norm_eps")


@dataclass(frozen=True)
class ViTConfig(_SquareTower):
    """A plain vision transformer and its connector: CLIP, SigLIP, InternViT and their kin."""

    kind: Literal["vit"] = "vit"
    class_token: bool = False
    """A learned token stands before the patches, with a position of its own."""
    mask_token: bool = False
    """The checkpoint holds a token for masked patches, which only its training used."""
    patch_bias: bool = True
    """A bias on the patch projection."""
    position: Literal["learned", "fractional", "rotary", "none"] = "learned"
    """learned: a table, a row for each patch. fractional: the same table, read where a patch of a smaller
    image lies in relation to it (Idefics). rotary: by row and column (Pixtral)."""
    pre_norm: bool = False
    """A norm before the first layer (CLIP)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm, in the layers."""
    norm_eps: float = 1e-6
    """Added to the variance in norms."""
    mlp: Literal["gated", "plain"] = "plain"
    """Gated or plain two-matrix MLP."""
    activation: Activation = "gelu_tanh"
    """Activation of the MLP."""
    attention_bias: bool = True
    """Biases on the query, key and value projections."""
    output_bias: bool = True
    """A bias on the output projection of attention."""
    mlp_bias: bool = True
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, over all heads together."""
    layer_scale: bool = False
    """Learned factors on what attention and the MLP add to the residual sum."""
    final_norm: Literal["used", "unused", "none"] = "used"
    """A norm after the last layer; unused: the checkpoint holds it, the features are read before it."""
    pooling_head: bool = False
    """The checkpoint holds SigLIP's head for whole images, which the features do not pass."""
    feature_layers: tuple[int, ...] = (-1,)
    """Hidden states that are read, joined along the width: 0 enters the first layer, -1 leaves the last."""
    drop_first: bool = False
    """The first feature, the class token, is no token of the image."""
    shuffle: int = 1
    """Squares of so many patches a side become one token, their features joined (pixel shuffle)."""
    pooled_side: int = 0
    """Patches are averaged to this many tokens a side (Gemma 3); 0: they are not."""
    connector: Literal["linear", "mlp", "merger", "resampler"] = "mlp"
    """From features to the decoder's width: one matrix, two, two after a matrix that merges squares of
    patches (Mistral 3), or a gated MLP and a resampler (Idefics2)."""
    connector_norm: Literal["none", "layer", "rms"] = "none"
    """A norm before the connector."""
    connector_norm_eps: float = 1e-5
    """Added to the variance there."""
    connector_norm_offset: float = 0.0
    """That norm scales by this plus its parameter (Gemma's is 1)."""
    connector_bias: bool = True
    """Biases in the connector."""
    connector_activation: Activation = "gelu"
    """Activation between two matrices of the connector."""
    connector_width: int = 0
    """Hidden width of a gated MLP in the connector."""
    resampler: ResamplerConfig | None = None
    """Of the connector resampler."""
    grid: tuple[tuple[int, int], ...] = ()
    """Heights and widths to which an image is fitted and then cut to tiles; empty: images are one tile."""
    max_tiles: int = 0
    """Features of more tiles than this are scaled down to about as many (LLaVA-OneVision); 0: never."""
    together: Literal["none", "images", "prefix"] = "none"
    """Tokens that see each other both ways: those of an image (Gemma 3), or of the prompt (PaliGemma)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pooled_side", "connector_width", "max_tiles"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for name in ("norm_eps", "connector_norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be positive and finite, is {getattr(self, name)}", key=name)
        if self.shuffle < 1:
            raise ConfigError(f"must be at least 1, is {self.shuffle}", key="shuffle")
        if not self.feature_layers:
            raise ConfigError("names no layer; -1 is the last one", key="feature_layers")
        if self.final_norm == "used" and self.feature_layers != (-1,):
            raise ConfigError("is after the last layer; read feature_layers [-1]", key="final_norm")
        if any(height < 1 or width < 1 for height, width in self.grid):
            raise ConfigError("heights and widths must be at least 1", key="grid")
        if (self.resampler is not None) != (self.connector == "resampler"):
            raise ConfigError("belongs to connector resampler, which needs it", key="resampler")
        self._check_features(self.image_size // self.patch_size)

    @property
    def has_newline(self) -> bool:
        """A learned token ends each row of an image that is cut to tiles."""
        return bool(self.grid)

    def features(self, side: int) -> int:
        """Features of one tile of side x side patches."""
        return side * side + int(self.class_token) - int(self.drop_first)

    def _check_features(self, side: int) -> None:
        """Refuses layers that there are not, and features that make no square where one is needed."""
        for layer in self.feature_layers:
            if not -self.num_layers - 1 <= layer <= self.num_layers:
                raise ConfigError(
                    f"{layer} is no hidden state of {self.num_layers} layers", key="feature_layers"
                )
        square = self.features(side) == side * side
        if not square and (self.shuffle > 1 or self.pooled_side or self.grid):
            raise ConfigError(
                f"{self.features(side)} features are no square; set drop_first with a class_token",
                key="drop_first",
            )
        if side % self.shuffle and self.connector != "merger":
            raise ConfigError(f"{side} patches a side cannot be joined by {self.shuffle}", key="shuffle")
        if self.pooled_side > side:
            raise ConfigError(f"exceeds the {side} patches a side", key="pooled_side")
        if self.grid and (self.shuffle > 1 or self.pooled_side):
            raise ConfigError("images cut to tiles keep all patches; set shuffle 1", key="grid")


@dataclass(frozen=True)
class QwenVisionConfig(_Tower):
    """A vision transformer over images of any size, whose squares of patches become tokens: Qwen2-VL to 3."""

    kind: Literal["qwen"] = "qwen"
    frames: int = 2
    """Frames in a patch; an image is repeated."""
    merge: int = 2
    """Squares of so many patches a side become one token."""
    patch_bias: bool = False
    """A bias on the patch projection (Qwen3-VL)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm (Qwen2.5-VL), with an epsilon of 1e-6."""
    mlp: Literal["gated", "plain"] = "plain"
    """Gated (Qwen2.5-VL) or plain two-matrix MLP."""
    activation: Activation = "quick_gelu"
    """Activation of the MLP."""
    window: int = 0
    """Pixels a side of the windows that layers see (Qwen2.5-VL); 0: all layers see the whole image."""
    full_layers: tuple[int, ...] = ()
    """Layers that see the whole image although there are windows."""
    position_side: int = 0
    """Rows and columns of the table of learned positions, stretched to each image (Qwen3-VL); 0: none."""
    deep_layers: tuple[int, ...] = ()
    """Layers whose outputs are added after the decoder's first ones, the earliest first (DeepStack of
    Qwen3-VL); the i-th named here has the i-th merger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "merge"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("window", "position_side"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        if self.full_layers and not self.window:
            raise ConfigError(
                "without windows all layers see the whole image; leave it empty", key="full_layers"
            )
        if len(set(self.deep_layers)) != len(self.deep_layers):
            raise ConfigError(f"{list(self.deep_layers)} names a layer twice", key="deep_layers")
        for name in ("full_layers", "deep_layers"):
            for layer in getattr(self, name):
                if not 0 <= layer < self.num_layers:
                    raise ConfigError(f"{layer} is none of {self.num_layers} layers", key=name)
        if self.window and not self.window_side:
            raise ConfigError(f"{self.window} pixels hold no token", key="window")
        if self.width // self.num_heads % 4:
            raise ConfigError(
                f"heads of {self.width // self.num_heads} dimensions; it must be a multiple of 4",
                key="num_heads",
            )

    @property
    def window_side(self) -> int:
        """Tokens a side of a window."""
        return self.window // self.merge // self.patch_size


@dataclass(frozen=True)
class MllamaVisionConfig(_SquareTower):
    """What Mllama has besides a vision transformer: tiles with embeddings, layers that read the images."""

    kind: Literal["mllama"] = "mllama"
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    activation: Activation = "gelu"
    """Activation of the MLP."""
    num_global_layers: int = 8
    """Layers over all tiles of an image, after those of the tower."""
    max_tiles: int = 4
    """Most tiles of an image."""
    aspect_ratios: tuple[tuple[int, int], ...] = (
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
        (2, 2),
        (3, 1),
        (4, 1),
    )
    """Tiles down and across, for each way to cut an image."""
    read_layers: tuple[int, ...] = (3, 7, 15, 23, 30)
    """Layers of the tower whose outputs are joined to the features."""
    cross_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    """Numbers, among all the decoder's layers, of those that read the image; the others are num_layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm_eps < float("inf"):
            raise ConfigError(f"must be positive and finite, is {self.norm_eps}", key="norm_eps")
        for name in ("num_global_layers", "max_tiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if not self.cross_layers or tuple(sorted(set(self.cross_layers))) != self.cross_layers:
            raise ConfigError("must be layer numbers in rising order", key="cross_layers")


VisionConfig = PlainVisionConfig | ViTConfig | QwenVisionConfig | MllamaVisionConfig

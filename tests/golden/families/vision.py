"""Cases of vision-language models."""

from vision_llava import LLAVAS, TILED
from vision_others import GEMMAS, IDEFICS3, INTERNVLS, KEYS
from vision_qwen import QWENS

VISION = {c.name: c for c in [*LLAVAS, *TILED, *QWENS, *INTERNVLS, *GEMMAS, *IDEFICS3, *KEYS]}

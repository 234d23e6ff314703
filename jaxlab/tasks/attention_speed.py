"""Task `attention-speed`: how long Native Sparse Attention takes beside dense attention, by length."""

from typing import Any

from jaxlab.app import Run
from jaxlab.evaluation import AttentionSpeedConfig, attention_speed_memory, measure_attention_speed

Config = AttentionSpeedConfig


def check(config: Config) -> dict[str, Any]:
    """What `--check` reports: memory by length, of shapes alone."""
    return {"temporary_bytes": attention_speed_memory(config)}


def run(config: Config, run: Run) -> dict[str, Any]:
    return measure_attention_speed(config)

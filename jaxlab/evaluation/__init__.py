"""Measures of models on held-out data."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.evaluation.answers import Answer, fill_all
    from jaxlab.evaluation.attention_speed import (
        AttentionSpeedConfig,
        attention_speed_memory,
        measure_attention_speed,
    )
    from jaxlab.evaluation.chosen_blocks import decoding_reads, describe_chosen_blocks
    from jaxlab.evaluation.held_out import measure_batch, measure_held_out
    from jaxlab.evaluation.needle import ByDepth
    from jaxlab.evaluation.prompting import find_ends, image_mark, read_prompt, render_prompts
    from jaxlab.evaluation.question_files import Question, read_questions
    from jaxlab.evaluation.questions import Measured, Questions, QuestionsConfig, prepare_questions
    from jaxlab.evaluation.rules import check_rule, obeys

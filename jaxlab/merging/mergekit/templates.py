"""Chat templates that mergekit's files may ask for by name, in Jinja: the public formats of these models."""

_REPLY = "{%- if add_generation_prompt -%}"

TEMPLATES: dict[str, str] = {
    # https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    "chatml": "{%- for turn in messages -%}"
    "{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}"
    "{%- endfor -%}" + _REPLY + "{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
    "llama3": "{{- bos_token -}}{%- for turn in messages -%}"
    "{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' ~ turn.content | trim ~ '<|eot_id|>' }}"
    "{%- endfor -%}" + _REPLY + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}",
    # https://docs.mistral.ai/guides/tokenization/: what the system says begins the first instruction
    "mistral": "{{- bos_token -}}{%- set said = namespace(before='') -%}{%- for turn in messages -%}"
    "{%- if turn.role == 'system' -%}{%- set said.before = turn.content ~ '\n\n' -%}"
    "{%- elif turn.role == 'user' -%}"
    "{{ ' [INST] ' ~ said.before ~ turn.content ~ ' [/INST]' }}{%- set said.before = '' -%}"
    "{%- elif turn.role == 'assistant' -%}{{ ' ' ~ turn.content ~ eos_token }}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' ~ turn.role) }}"
    "{%- endif -%}{%- endfor -%}",
    # https://github.com/tatsu-lab/stanford_alpaca
    "alpaca": "{%- for turn in messages -%}"
    "{%- if turn.role == 'system' -%}{{ turn.content | trim ~ '\n\n' }}"
    "{%- elif turn.role == 'user' -%}{{ '### Instruction:\n' ~ turn.content | trim ~ '\n\n' }}"
    "{%- elif turn.role == 'user_context' -%}{{ '### Input:\n' ~ turn.content | trim ~ '\n\n' }}"
    "{%- elif turn.role == 'assistant' -%}{{ '### Response:\n' ~ turn.content | trim ~ '\n\n' }}"
    "{%- endif -%}{%- endfor -%}" + _REPLY + "{{ '### Response:\n' }}{%- endif -%}",
    # https://huggingface.co/LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct: an empty system turn where there is none
    "exaone": "{%- if not messages or messages[0].role != 'system' -%}"
    "{{ '[|system|][|endofturn|]\n' }}{%- endif -%}"
    "{%- for turn in messages -%}{{ '[|' ~ turn.role ~ '|]' ~ turn.content }}"
    "{{ '\n' if turn.role == 'user' else '[|endofturn|]\n' }}{%- endfor -%}"
    + _REPLY
    + "{{ '[|assistant|]' }}{%- endif -%}",
}

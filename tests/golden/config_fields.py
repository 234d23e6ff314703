"""The fields of transformers' config classes, with their defaults: what a config.json that it wrote can hold.

    python3.11 -m venv env && env/bin/pip install transformers==5.24.0
    env/bin/python tests/golden/config_fields.py

Run it with every version that the file names; each adds its own. No torch is needed.
"""

import json
from pathlib import Path

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

OUT = Path(__file__).with_name("config_fields.json")
TYPES = (
    *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3_text"),
    *("glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granite", "llama", "llama4_text", "ministral"),
    *("mistral", "mixtral", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "seed_oss", "smollm3", "stablelm"),
)


def main() -> None:
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    classes = {"": PretrainedConfig, **{t: CONFIG_MAPPING[t] for t in TYPES if t in CONFIG_MAPPING}}
    fields = {name: cls().to_dict() for name, cls in classes.items()}
    base = fields[""]
    own = lambda values: {
        key: value for key, value in values.items() if key not in base or value != base[key]
    }
    found[transformers.__version__] = {"": base, **{t: own(fields[t]) for t in fields if t}}
    text = json.dumps(dict(sorted(found.items())), sort_keys=True, default=str)
    OUT.write_text(text.replace('}, "', '},\n"') + "\n")


main()

"""The files that transformers writes for the processors of tests/golden/processors.

    python processors.py

Writes processors/CASE.json beside this file: file name -> content, of the processor_config.json that
`save_pretrained` writes (all settings, not only those that a case names; transformers 5 writes no
preprocessor_config.json). What the processors make of images and prompts is in tests/golden/processors.
"""

import importlib.util
import json
from pathlib import Path

import transformers

HERE = Path(__file__).parent


def main() -> None:
    path = HERE.parent / "processors" / "make.py"
    spec = importlib.util.spec_from_file_location("processor_cases", path)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    # No video processor is needed, and without torchvision there is none.
    transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class = lambda *_: None
    transformers.logging.set_verbosity_error()
    (HERE / "processors").mkdir(exist_ok=True)
    for name, case in cases.CASES.items():
        written = {"processor_config.json": json.loads(cases.build(case).to_json_string())}
        (HERE / "processors" / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
        print(name, {file: sorted(content) for file, content in written.items()})


if __name__ == "__main__":
    main()

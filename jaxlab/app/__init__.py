"""The application around the tasks: command line, run folders, sweeps, provenance, names of models."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.app.cli import run_command_line
    from jaxlab.app.compile_cache import use_compile_cache
    from jaxlab.app.interrupts import Stop, save_first
    from jaxlab.app.provenance import code, environment
    from jaxlab.app.references import (
        checkpoints_of,
        model_folder,
        open_reference,
        reference_folders,
        train_inputs,
    )
    from jaxlab.app.registry import Registry, Task
    from jaxlab.app.runs import Run, RunResult, command_line, read_metrics, read_results, run_config, run_name

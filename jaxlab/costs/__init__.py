"""What a model costs before it is run: floating-point operations and memory."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.costs.collectives import Collective, by_kind, read_collectives
    from jaxlab.costs.flops import PEAK_FLOPS, attended_tokens, peak_flops, train_flops_per_token
    from jaxlab.costs.memory import bytes_per_device, compiled_memory, generation_memory, planned_memory
    from jaxlab.costs.programs import let_go_of_programs

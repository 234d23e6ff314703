"""Several processes that compute one run: how they find each other, what they tell each other, how they end.

Without `start` there is one process, and everything here does nothing.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.distributed.agreement import Agreement
    from jaxlab.distributed.config import ClusterConfig, DistributedConfig, ExplicitConfig, OneProcessConfig
    from jaxlab.distributed.environment import Place, expand_nodes, find_place
    from jaxlab.distributed.processes import (
        compile_together,
        gather,
        is_main,
        joined,
        leave,
        process_count,
        process_index,
        share,
        tell_end,
        wait_for_all,
    )

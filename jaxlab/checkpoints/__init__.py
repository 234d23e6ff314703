"""Models on disk: opened without trust, read to where they will live, written whole or not at all.

README.md beside this file is the map.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.checkpoints import families
    from jaxlab.checkpoints.adapters import (
        AdapterSettings,
        Matrix,
        find_targets,
        matrices,
        save_adapter,
        whole_tensors,
    )
    from jaxlab.checkpoints.assembly import Assembly, TowerConfig, assemble, plan_vlm
    from jaxlab.checkpoints.compatibility import (
        SameTokens,
        check_same_tree,
        decides_tensors,
        differences,
        language_differences,
        language_settings_apart,
        same_tokens,
    )
    from jaxlab.checkpoints.digests import DIGESTS, find_damage
    from jaxlab.checkpoints.families import head_name, layer_types
    from jaxlab.checkpoints.families import read_config as read_hf_config
    from jaxlab.checkpoints.formats.base import NotFinite, OpenModel
    from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
    from jaxlab.checkpoints.formats.hf_write import hf_family, huggingface_config, huggingface_form
    from jaxlab.checkpoints.generation_config import OPTIONS, sampling_options, stop_strings
    from jaxlab.checkpoints.inspection import (
        ModelReport,
        compare_for_merging,
        inspect_model,
        wrong_shapes,
    )
    from jaxlab.checkpoints.locate import resolve, split_adapter
    from jaxlab.checkpoints.named_tensors import (
        ModelTensors,
        check_tied_heads,
        model_tensors,
        tensors_laid_out_as,
        tensors_of_shapes,
    )
    from jaxlab.checkpoints.open import describe_model, load_model, open_model
    from jaxlab.checkpoints.orbax_tree import restore_tree, save_tree
    from jaxlab.checkpoints.output_folder import check_output, files_below, remove_empty, write_aside
    from jaxlab.checkpoints.resume import ResumableFolder, remove_partial, resumable_folder
    from jaxlab.checkpoints.safetensors_file import Tensor, read_header, read_metadata
    from jaxlab.checkpoints.save import kept_files, save_model
    from jaxlab.checkpoints.source_files import SourceFiles
    from jaxlab.checkpoints.tensor_folder import Planned, TensorFolder, in_shards, open_folder, read_json
    from jaxlab.checkpoints.tensor_kinds import TensorKind
    from jaxlab.checkpoints.tensor_map import (
        Entry,
        entries,
        from_hf,
        host_tensors,
        leaf_at,
        to_hf,
        tree_of,
    )
    from jaxlab.checkpoints.tensor_table import EMBEDDING, HEAD, LeafPath
    from jaxlab.checkpoints.verification import verify_logits, verify_tensors

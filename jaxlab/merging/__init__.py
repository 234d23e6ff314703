"""Merging of models: task vectors, operators, injection of a language model's skills into a vision-language
model, and the search for the weights that show them.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.merging.account import AccountLine, MergeAccount
    from jaxlab.merging.architecture import check_same_architecture, note_dequantized
    from jaxlab.merging.diagnosis import FORMAT as DIAGNOSIS_FORMAT
    from jaxlab.merging.diagnosis import Diagnosis, Finding, diagnose
    from jaxlab.merging.diagnosis import table as diagnosis_table
    from jaxlab.merging.engine import execute
    from jaxlab.merging.in_forward import MergedInForward, forward_merged, tensor_weights
    from jaxlab.merging.in_memory import merge_by_recipe, save_merged, verify_merged
    from jaxlab.merging.injection import Method, inject
    from jaxlab.merging.injection_plan import InjectionPlan, plan_injection
    from jaxlab.merging.merge import merge_models, merge_tensors, task_vector
    from jaxlab.merging.merge_data import MergeData
    from jaxlab.merging.mergekit.file import MergekitFile
    from jaxlab.merging.mergekit.file import ModelReference as MergekitReference
    from jaxlab.merging.mergekit.reading import read_mergekit_file
    from jaxlab.merging.mergekit.stages import prepare_file as prepare_mergekit_file
    from jaxlab.merging.mergekit.stages import write_file as write_mergekit_file
    from jaxlab.merging.needs import check_room, describe, needs_of
    from jaxlab.merging.numbers import Rule
    from jaxlab.merging.on_mesh import inject_on_mesh, merge_on_mesh
    from jaxlab.merging.operators import AFTERWARDS, OPERATORS, Operator, operator_named
    from jaxlab.merging.operators.data import entropy, learn_coefficients
    from jaxlab.merging.operators.registry import afterwards, operator
    from jaxlab.merging.output import (
        Writing,
        finished_account,
        notes_of,
        verify_folder,
        write_merge,
        write_merges,
    )
    from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, open_inputs
    from jaxlab.merging.plan import Source as TensorSource
    from jaxlab.merging.preparing import prepare_merge
    from jaxlab.merging.random_masks import tensor_key
    from jaxlab.merging.recipe import (
        Expert,
        InjectRecipe,
        MergeRecipe,
        Trio,
        inject_by_recipe,
        load_recipe,
        read_trio,
    )
    from jaxlab.merging.recipe import described as described_recipe
    from jaxlab.merging.search.choice import Way, check_way
    from jaxlab.merging.search.entry import DETAILS, Effort, Measuring, Split, search_entry
    from jaxlab.merging.search.evaluator import Evaluator
    from jaxlab.merging.search.gradient import learned_on
    from jaxlab.merging.search.journal import Journal
    from jaxlab.merging.search.measures import (
        ANSWERS,
        ENTROPY,
        SCORE,
        Data,
        answered,
        own_answers,
        read_data,
        score_tokens,
        stack_batches,
        text_only,
        token_measure,
    )
    from jaxlab.merging.search.space import Interval, Point, SearchMethod, Space
    from jaxlab.merging.search.task_vectors import compare_task_vectors
    from jaxlab.merging.streams import count_not_finite
    from jaxlab.merging.sweep import load_recipes

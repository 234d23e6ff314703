"""Reads files of mergekit.

What mergekit would pass over in silence (keys that it does not have, parameters that a method does not use)
is noted; what it would stumble over later is refused here, with its line.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxlab.config import suggestion
from jaxlab.errors import ConfigError
from jaxlab.files import LONGEST_CONFIG, read_bounded
from jaxlab.merging.mergekit.documents import Document, Keys, read_documents
from jaxlab.merging.mergekit.file import (
    MergekitFile,
    MergekitMerge,
    ModelReference,
    Module,
    OutputSlice,
    Parameters,
    SliceSource,
    TokenizerRule,
    TokenSource,
    problem_with_inputs,
    stage_named,
)
from jaxlab.merging.mergekit.methods import IGNORED, METHODS, MergeMethod
from jaxlab.merging.mergekit.templates import TEMPLATES
from jaxlab.merging.numbers import Setting, as_kind, shown

DTYPES = ("bfloat16", "float16", "float32")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16", "fp32": "float32"}
_SHORT |= {"f32": "float32", "float": "float32"}
_MOE = "a file of mergekit-moe, which makes a mixture of experts out of dense models"
_LORA = "what mergekit-extract-lora does, which makes an adapter out of two models"
_OTHER_TOOLS = {
    **dict.fromkeys(("experts", "gate_mode"), _MOE),
    **dict.fromkeys(("finetuned_model", "extract_lora"), _LORA),
    "genome": "a file of mergekit-evolve; merge-search searches for the numbers of a merge",
}
_OTHER_METHODS = {"moe": _MOE, "mergekit-moe": _MOE, "extract_lora": _LORA, "extract-lora": _LORA}
_TOP = (
    "name",
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "random_seed",
)
_SEED = (1 << 32) - 1


def read_mergekit_file(path: str | os.PathLike[str]) -> MergekitFile:
    """What a file says.

    Raises:
      ConfigError: it is not one of mergekit's, or asks for what is not there.
    """
    where = os.fspath(path)
    try:
        text = read_bounded(path, LONGEST_CONFIG).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("not a text file in UTF-8", where=where) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=where) from None
    return parse_mergekit_file(text, where)


def parse_mergekit_file(text: str, where: str) -> MergekitFile:
    """The same of its text.

    Raises:
      ConfigError: see `read_mergekit_file`.
    """
    documents = read_documents(text, where)
    if not documents:
        raise ConfigError("empty; a merge names its models and a merge_method", where=where)
    notes: list[str] = []
    merges = [_Reader(document, notes).merge() for document in documents]
    trees = [document.value for document in documents]
    tree = trees[0] if len(trees) == 1 else trees
    return MergekitFile(text, tree, _ordered(merges, where), tuple(notes))


def _ordered(merges: list[MergekitMerge], where: str) -> tuple[MergekitMerge, ...]:
    """Stages before those that read them; the unnamed one, or the last of the file, at the end.

    Raises:
      ConfigError: two have one name, or need each other.
    """
    by_name: dict[str | None, MergekitMerge] = {}
    for merge in merges:
        if merge.name in by_name:
            called = f"are named {merge.name}" if merge.name else "have no name"
            raise ConfigError(f"two merges {called}; stages need names of their own", where=merge.where)
        by_name[merge.name] = merge
    final = by_name.get(None, merges[-1])
    done: dict[str | None, MergekitMerge] = {}

    def visit(merge: MergekitMerge, above: tuple[str | None, ...]) -> None:
        if merge.name in above:
            raise ConfigError(f"the merge {merge.name or 'without a name'} needs itself", where=merge.where)
        if merge.name in done:
            return
        for reference in merge.references():
            needed = stage_named(reference, by_name)
            if needed is not None:
                visit(by_name[needed], (*above, merge.name))
        done[merge.name] = merge

    visit(final, ())
    unused = [merge for merge in merges if merge.name not in done]
    if unused:
        raise ConfigError(
            f"no other merge of the file needs {unused[0].name}; one file makes one model",
            where=unused[0].where,
        )
    return tuple(done.values())


class _Reader:
    """Reads one document."""

    def __init__(self, document: Document, notes: list[str]) -> None:
        self.document, self.notes = document, notes
        for keys in document.repeated:
            self.note(keys, "stands here twice; the last one counts")

    def note(self, keys: Keys, message: str) -> None:
        self.notes.append(str(self.document.error(keys, message)))

    def mapping(self, value: Any, keys: Keys, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.document.error(keys, f"must be {what}, is {_shown(value)}")
        return value

    def listed(self, value: Any, keys: Keys, what: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.document.error(keys, f"must be a list of {what}, is {_shown(value)}")
        return value

    def merge(self) -> MergekitMerge:
        tree = self.mapping(self.document.value, (), "lines of `key: value`")
        for key, what in _OTHER_TOOLS.items():
            if key in tree:
                raise self.document.error((key,), f"{what}; that is not done here")
        method = self.method(tree)
        self.unknown(tree, (), _TOP, method)
        modules = self.modules(tree, method)
        base = None if tree.get("base_model") is None else self.model(tree["base_model"], ("base_model",))
        parameters = self.parameters(tree.get("parameters"), ("parameters",), method)
        merge = MergekitMerge(
            self.document.place(()),
            self.name(tree.get("name")),
            method,
            modules,
            base,
            parameters,
            self.dtype(tree.get("dtype"), ("dtype",)),
            self.dtype(tree.get("out_dtype"), ("out_dtype",)),
            self.tokenizer(tree),
            self.chat_template(tree.get("chat_template")),
            self.seed(tree.get("random_seed")),
        )
        self.inputs(merge)
        return merge

    def method(self, tree: Mapping[str, Any]) -> MergeMethod:
        name = tree.get("merge_method")
        if name is None:
            hint = suggestion("merge_method", tree)
            raise self.document.error(
                (), f"no merge_method{hint}; a file of ours begins with kind: (merge or inject)"
            )
        if not isinstance(name, str) or name not in METHODS:
            keys: Keys = ("merge_method",)
            if isinstance(name, str) and name in _OTHER_METHODS:
                raise self.document.error(keys, f"{_OTHER_METHODS[name]}; that is not done here")
            hint = suggestion(str(name)[:40], METHODS) or f"; there are {', '.join(METHODS)}"
            raise self.document.error(keys, f"no such method, {_shown(name)}{hint}")
        return METHODS[name]

    def name(self, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
            raise self.document.error(("name",), f"must be a word, is {_shown(value)}")
        return str(value)

    def seed(self, value: Any) -> int:
        if value is None:
            return 0
        try:
            seed = as_kind(value, "count")
        except ConfigError as error:
            raise self.document.error(("random_seed",), error.message) from None
        if not 0 <= seed <= _SEED:
            raise self.document.error(("random_seed",), f"must be between 0 and {_SEED}, is {_shown(value)}")
        return int(seed)

    def unknown(
        self, tree: Mapping[str, Any], keys: Keys, known: Iterable[str], method: MergeMethod
    ) -> tuple[str, ...]:
        """Notes keys that mergekit does not have there; parameters among them, which are in the wrong
        place.
        """
        misplaced = []
        for key in tree:
            if key in known:
                continue
            if key in (*method.per_input, *method.shared):
                misplaced.append(key)
                self.note((*keys, key), "is not read here: it belongs into parameters, a level deeper")
            else:
                hint = suggestion(key, known)
                self.note((*keys, key), f"mergekit has no such key here and passes over it{hint}")
        return tuple(misplaced)

    def modules(self, tree: Mapping[str, Any], method: MergeMethod) -> tuple[Module, ...]:
        given = [key for key in ("models", "slices", "modules") if tree.get(key)]
        if len(given) != 1:
            found = "none of them" if not given else " and ".join(given)
            raise self.document.error((), f"one of models, slices and modules is needed, found {found}")
        if given[0] != "modules":
            return (self.module(None, tree, (), {}, method),)
        named = self.mapping(tree["modules"], ("modules",), "a mapping of modules by name")
        result = []
        for name, part in named.items():
            keys: Keys = ("modules", name)
            part = self.mapping(part, keys, "a mapping with slices or models")
            self.unknown(part, keys, ("models", "slices", "parameters"), method)
            if bool(part.get("models")) == bool(part.get("slices")):
                raise self.document.error(keys, "needs slices or models, one of them")
            parameters = self.parameters(part.get("parameters"), (*keys, "parameters"), method)
            result.append(
                self.module(
                    None if len(named) == 1 and name == "default" else name, part, keys, parameters, method
                )
            )
        return tuple(result)

    def module(
        self,
        name: str | None,
        tree: Mapping[str, Any],
        keys: Keys,
        parameters: Parameters,
        method: MergeMethod,
    ) -> Module:
        if tree.get("models"):
            place = (*keys, "models")
            models = [
                self.source(one, (*place, i), method, whole=True)
                for i, one in enumerate(self.listed(tree["models"], place, "models"))
            ]
            part = OutputSlice(tuple(models), {}, self.document.place(place))
            return Module(name, (part,), parameters, whole=True)
        place = (*keys, "slices")
        slices = [
            self.slice(one, (*place, i), method)
            for i, one in enumerate(self.listed(tree["slices"], place, "slices"))
        ]
        return Module(name, tuple(slices), parameters, whole=False)

    def slice(self, value: Any, keys: Keys, method: MergeMethod) -> OutputSlice:
        tree = self.mapping(value, keys, "a mapping with sources")
        known = ("sources", "base_model", "residual_weight", "parameters")
        self.unknown(tree, keys, known, method)
        place = (*keys, "sources")
        sources = [
            self.source(one, (*place, i), method, whole=False)
            for i, one in enumerate(self.listed(tree.get("sources"), place, "sources"))
        ]
        base = tree.get("base_model")
        lengths = [source.layers[1] - source.layers[0] for source in sources if source.layers]
        if len(set(lengths)) > 1:
            listed = " and ".join(map(str, lengths))
            raise self.document.error(keys, f"its sources have {listed} layers; all need the same number")
        return OutputSlice(
            tuple(sources),
            self.parameters(tree.get("parameters"), (*keys, "parameters"), method),
            self.document.place(keys),
            None if base is None else self.model(base, (*keys, "base_model")),
        )

    def source(self, value: Any, keys: Keys, method: MergeMethod, *, whole: bool) -> SliceSource:
        tree = self.mapping(value, keys, "a mapping with model")
        known = ("model", "parameters") if whole else ("model", "layer_range", "parameters")
        misplaced = self.unknown(tree, keys, known, method)
        return SliceSource(
            self.model(tree.get("model"), (*keys, "model")),
            None if whole else self.layers(tree.get("layer_range"), (*keys, "layer_range")),
            self.parameters(tree.get("parameters"), (*keys, "parameters"), method),
            self.document.place(keys),
            misplaced,
        )

    def layers(self, value: Any, keys: Keys) -> tuple[int, int]:
        wanted = "two whole numbers, the first layer and the one after the last"
        try:
            start, stop = (as_kind(item, "count") for item in (value if isinstance(value, list) else ()))
        except (ValueError, ConfigError):
            raise self.document.error(keys, f"must be {wanted}, is {_shown(value)}") from None
        if not 0 <= start <= stop:
            raise self.document.error(keys, f"must be {wanted}, is {_shown(value)}")
        return start, stop

    def model(self, value: Any, keys: Keys) -> ModelReference:
        """`path`, `path@revision`, `path+adapter`, or the same as mappings."""
        if isinstance(value, Mapping):
            if value.get("override_architecture"):
                raise self.document.error(
                    keys, "override_architecture is not followed: the model's own config.json counts"
                )
            lora = value.get("lora")
            return ModelReference(self.path(value.get("model"), keys), lora and self.path(lora, keys))
        if isinstance(value, str) and value.strip():
            path, *more = [value] if os.path.exists(value) else value.split("+")
            if len(more) > 1 or not path or not all(more):
                raise self.document.error(keys, f"{_shown(value)} is no model: it is model or model+adapter")
            return ModelReference(path, more[0] if more else None)
        raise self.document.error(keys, f"must be a model's folder or hub id, is {_shown(value)}")

    def path(self, value: Any, keys: Keys) -> str:
        if isinstance(value, Mapping):
            path, revision = self.path(value.get("path"), keys), value.get("revision")
            return path if revision is None else f"{path}@{self.path(revision, keys)}"
        if not isinstance(value, str) or not value.strip():
            raise self.document.error(keys, f"must be a model's folder or hub id, is {_shown(value)}")
        return value

    def parameters(self, value: Any, keys: Keys, method: MergeMethod) -> dict[str, Setting]:
        if value is None:
            return {}
        found = {}
        for name, written in self.mapping(value, keys, "a mapping of parameters").items():
            place = (*keys, name)
            if name not in (*method.per_input, *method.shared):
                if name not in IGNORED:
                    hint = suggestion(name, (*method.per_input, *method.shared))
                    self.note(place, f"{method.name} does not use it{hint}")
                continue
            try:
                found[name] = Setting.of(written)
                found[name].check(method.kind(name))
            except ConfigError as error:
                inner = (*place, *(int(k) if k.isdigit() else k for k in error.key.split(".") if k))
                raise self.document.error(inner, error.message) from None
        return found

    def dtype(self, value: Any, keys: Keys) -> str | None:
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name in DTYPES:
            return name
        if name in ("float64", "int64"):
            raise self.document.error(keys, f"{name} is not computed here; there are {', '.join(DTYPES)}")
        meant = _SHORT.get(name.lower())
        hint = f"; did you mean {meant}?" if meant else suggestion(name, DTYPES)
        raise self.document.error(
            keys, f"no such dtype, {_shown(value)}{hint or '; there are ' + ', '.join(DTYPES)}"
        )

    def chat_template(self, value: Any) -> str | None:
        if value is None or value == "":
            return None
        keys: Keys = ("chat_template",)
        if not isinstance(value, str):
            raise self.document.error(keys, f"must be a name or a template, is {_shown(value)}")
        if value != "auto" and value not in TEMPLATES and "{" not in value:
            hint = suggestion(value, TEMPLATES) or f"; there are auto, {', '.join(TEMPLATES)}, and Jinja"
            raise self.document.error(keys, f"no such chat template, {_shown(value)}{hint}")
        return value

    def tokenizer(self, tree: Mapping[str, Any]) -> TokenizerRule | None:
        if tree.get("tokenizer_source") and tree.get("tokenizer") is not None:
            raise self.document.error(("tokenizer",), "tokenizer_source is given too; give one of them")
        if tree.get("tokenizer_source"):
            return TokenizerRule(self.vocabulary(tree["tokenizer_source"], ("tokenizer_source",)))
        if tree.get("tokenizer") is None:
            return None
        keys: Keys = ("tokenizer",)
        given = self.mapping(tree["tokenizer"], keys, "a mapping")
        for key in given:
            if key not in ("source", "tokens", "pad_to_multiple_of"):
                hint = suggestion(key, ("source", "tokens", "pad_to_multiple_of"))
                self.note((*keys, key), f"mergekit has no such key here and passes over it{hint}")
        tokens = {
            token: self.token(value, (*keys, "tokens", token))
            for token, value in self.mapping(
                given.get("tokens") or {}, (*keys, "tokens"), "a mapping of tokens"
            ).items()
        }
        multiple = given.get("pad_to_multiple_of")
        if multiple is not None:
            place = (*keys, "pad_to_multiple_of")
            try:
                multiple = as_kind(multiple, "count")
            except ConfigError as error:
                raise self.document.error(place, error.message) from None
            if not 0 <= multiple <= 1 << 20:
                raise self.document.error(place, f"must be a multiple for rows, is {_shown(multiple)}")
        source = self.vocabulary(given.get("source", "union"), (*keys, "source"))
        return TokenizerRule(source, tokens, multiple or None)

    def vocabulary(self, value: Any, keys: Keys) -> Literal["union", "base"] | ModelReference:
        if value == "union" or value == "base":
            return value
        return self.model(value.removeprefix("model:") if isinstance(value, str) else value, keys)

    def token(self, value: Any, keys: Keys) -> TokenSource:
        tree = self.mapping(value, keys, "a mapping with source")
        try:
            force = as_kind(tree.get("force", False), "switch")
        except ConfigError as error:
            raise self.document.error((*keys, "force"), error.message) from None
        source, place = tree.get("source"), (*keys, "source")
        if source is None:
            return TokenSource("unsaid", force=force)
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if kind == "zero":
            return TokenSource("zero", force=force)
        if kind != "model_token":
            return TokenSource("model", self.model(source, place), force=force)
        token, token_id = source.get("token"), source.get("token_id")
        if (token is None) == (token_id is None):
            raise self.document.error(place, "model_token needs token or token_id, one of them")
        if token_id is not None and (not isinstance(token_id, int) or token_id < 0):
            raise self.document.error((*place, "token_id"), f"must be an id, is {_shown(token_id)}")
        model = self.model(source.get("model"), (*place, "model"))
        return TokenSource("model_token", model, None if token is None else str(token), token_id, force)

    def inputs(self, merge: MergekitMerge) -> None:
        """Whether every slice has the inputs that the method takes."""
        for module in merge.modules:
            for part in module.slices:
                base = part.base_model or merge.base_model
                problem = problem_with_inputs(merge, module, part, base)
                if problem:
                    raise ConfigError(problem, where=part.where)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return shown(value)

"""Writes docs/operators.md, the list of all merge operators, out of their declarations.

python docs/operators.py
"""

import inspect
from pathlib import Path

from jaxlab.files import write_atomic
from jaxlab.merging import AFTERWARDS, OPERATORS, Operator
from jaxlab.merging.operators.declarations import REQUIRED, NotInjected, Parameter
from jaxlab.merging.operators.registry import operator_named
from jaxlab.merging.parameters import FIXED_BY_INJECTION, open_parameters

PAGE = Path(__file__).parent / "operators.md"

HEAD = """# Merge operators

Made by `python docs/operators.py` out of their declarations; [merge_operators.md](merge_operators.md) says
how to add one. Each name is a `merge_tensors(name, ...)` and an `operator: name` of recipes. w_i are the
weights (`weight`, 1 by default), x_i the models, d_i = x_i - base; what operators on task vectors give is
added to the base.

- **Parameters**: defaults in mode `paper`, and after a slash in mode `mergekit` where they differ.
  *must be given*: there is none.
- **An element needs**: the same `element` of the inputs, its `row` or column, the whole `tensor`, the whole
  tensor as a `matrix` (products or singular values), or the whole `model`; after a slash in mode `mergekit`.
- **Injected**: what lambda_v and lambda_e are, d_v and d_e being the task vectors of the VLM's language model
  and of the expert. *weights*: of d_v and d_e; *scaled*: they scale d_v and d_e before anything else; *two
  models*: base + lambda_v d_v and base + lambda_e d_e are merged, with equal weights; *a pair*: the first of
  these stands for the base; *along the arc*: they say how far along it and how far out; *no*: it cannot be.
- **In an injection**: what is not as outside of one. *fixed*: parameters that no recipe can give, since the
  lambdas say how much; *must be given*: parameters whose default would do nothing; *from the lambdas*:
  a parameter that these take the place of, and how; *no base*: it merges the two models without one.

An injection of `linear` is one of `task_arithmetic`: without normalising both are
base + lambda_v d_v + lambda_e d_e.

Left out, since no text with their formulas could be read: FRANK (2505.16151) and IP-Merging (2510.14387).
"""


def number(value: object) -> str:
    if value is REQUIRED:
        return "*must be given*"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def described(parameter: Parameter) -> str:
    paper, mergekit = (number(parameter.default_in(mode)) for mode in ("paper", "mergekit"))
    return f"`{parameter.name}` {paper}" + (f" / {mergekit}" if mergekit != paper else "")


def injected(operator: Operator) -> str:
    if isinstance(operator.injection, NotInjected):
        return "no"
    if callable(operator.injection):
        return "along the arc"
    if operator.injection == "pair":
        return "a pair"
    if not operator.for_injection.weighted_first:
        return "weights"
    return "two models" if operator.of_models else "scaled"


def in_injection(operator: Operator) -> str:
    if isinstance(operator.injection, NotInjected):
        return operator.injection.reason
    as_injected = operator.for_injection
    closed = {name: value for name, value in FIXED_BY_INJECTION.items() if name in operator.parameters}
    fixed = [f"`{name}` {number(value)}" for name, value in closed.items()]
    opened = open_parameters(as_injected, injected=True)
    asked = [f"`{name}`" for name, parameter in opened.items() if parameter.asked]
    replaced = [f"`{name}`" for name in operator.parameters if name not in as_injected.parameters]
    parts = [
        f"fixed: {', '.join(fixed)}" if fixed else "",
        f"must be given: {', '.join(asked)}" if asked else "",
        f"{', '.join(replaced)} from the lambdas: {operator.injected_formula}" if replaced else "",
        "no base" if as_injected.makes_tensor and operator.base == "optional" else "",
    ]
    return "; ".join(filter(None, parts)).removesuffix(".") or "as outside"


def needs(operator: Operator) -> str:
    words = {
        "key": "random key",
        "statistics": "statistics of data",
        "num_layers": "depth",
        "totals": "sums over all tensors",
    }
    found = [text for name, text in words.items() if operator.takes(name)]
    base = {"required": "base", "optional": "base or none", "unused": "no base"}[operator.base]
    return ", ".join([base, *found])


def row(operator: Operator) -> str:
    scopes = dict.fromkeys(operator.scope(mode) for mode in ("paper", "mergekit"))
    name = f"`{operator.name}`" + (" (a model for each task)" if operator.per_task else "")
    parameters = ", ".join(described(p) for p in operator.parameters.values()) or "none"
    weight = "" if operator.takes("weights") else " (no weight)"
    cells = (
        name,
        operator.source,
        parameters + weight,
        " / ".join(scopes),
        needs(operator),
        injected(operator),
        in_injection(operator),
    )
    return f"| {' | '.join(cells)} |"


def formula(function: object) -> str:
    text = inspect.getdoc(function) or ""
    return " ".join(text.split("\n\nRaises:")[0].split("\n\nArgs:")[0].split())


def page() -> str:
    head = [
        "| operator | paper | parameters | an element needs | needs beside the models | injected "
        "| in an injection |",
        "|" + "---|" * 7,
    ]
    after = [operator_named(name) for name in AFTERWARDS]
    parts = [
        HEAD,
        *head,
        *(row(operator) for operator in OPERATORS.values()),
        "\nThese follow any operator on task vectors, as in `ties+svc`; alone they follow task_arithmetic.\n",
        *head,
        *(row(operator) for operator in after),
        "\n## Formulas\n",
        *(f"- `{o.name}`: {formula(o.function)}" for o in OPERATORS.values()),
        *(f"- `{name}`: {formula(step.function)}" for name, step in AFTERWARDS.items()),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    write_atomic(PAGE, page())

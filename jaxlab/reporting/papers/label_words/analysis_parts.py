"""The pictures and tables of the analyses beyond flows and blocking, each where a run has it."""

from jaxlab.reporting.folders import RunFolder
from jaxlab.reporting.formats import decimal, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import figure, note, table
from jaxlab.reporting.papers.label_words import analysis_plots as plots


def name_of(what: str, number: int) -> str:
    """A name that is unique on the page: the first analysis has the plain one."""
    return f"icl-{what}" if number == 0 else f"icl-{what}-{number + 1}"


def pictures(run: RunFolder, number: int) -> list[Markup]:
    """Of every analysis that the run has, in the paper's order."""
    found: list[Markup] = []
    for name, make in (
        ("attention", _attention),
        ("reweighting", _reweighting),
        ("compression", _compression),
        ("diagnosis", _diagnosis),
        ("faithfulness", _faithfulness),
        ("many_shot", _many_shot),
        ("heads", _heads),
    ):
        if run.get(name):
            found += make(run, number)
    return found


def _attention(run: RunFolder, number: int) -> list[Markup]:
    if run.get("attention", "aucroc") is None:
        alone = run.get("attention", "single_class")
        return [note(f"AUCROC is undefined: the model predicts {alone or 'one label'} alone.")]
    return [
        figure(
            plots.attention_figure(run.results),
            name_of("attention", number),
            "How well attention to label words predicts the answer, by layer.",
            "AUCROC takes the attention from the last token to each label word as a score for the label "
            "that the "
            "model then predicts. R_l adds up what layers give above chance. The paper sees both rise in "
            "middle "
            "and deep layers.",
        )
    ]


def _reweighting(run: RunFolder, number: int) -> list[Markup]:
    found = run.get("reweighting")
    return [
        figure(
            plots.reweighting_figure(run.results),
            name_of("reweighting", number),
            "Anchor re-weighting.",
            "Attention from the last token to each label word is multiplied by a learned factor, one for "
            "each "
            f"layer, head and label, from {found['train_per_class']} examples of each class in "
            f"{found['epochs']} epochs; the model is frozen. Learning rate {found['learning_rate']}.",
        )
    ]


def _compression(run: RunFolder, number: int) -> list[Markup]:
    found = run.get("compression")
    hidden = found.get("undefined") or []
    told = lambda row, name: "undefined" if name in hidden else percent(row[name], 1)
    rows = [
        [row["method"], *(told(row, name) for name in ("label_loyalty", "word_loyalty", "accuracy"))]
        for row in found["table"]
    ]
    tokens, speed = found["tokens"], found["speed_up"]
    return [
        figure(
            plots.compression_figure(run.results),
            name_of("compression", number),
            "Demonstrations compressed to their anchors.",
            f"Of {decimal(tokens['demonstrations'], 0)} tokens of demonstrations the cache keeps "
            f"{decimal(tokens['kept'], 0)}; the "
            f"query has {decimal(tokens['query'], 0)}. A query takes "
            f"{decimal(speed['against_the_whole_prompt'], 2)} times "
            "less time than the whole prompt, and "
            f"{decimal(speed['against_a_full_cache'], 2)} times less than from a cache of all demonstrations "
            f"(medians of {found['times_measured']} in turn, batch {found['batch']}).",
        ),
        table(
            ["method", "label loyalty", "word loyalty", "accuracy"],
            rows,
            "The same in numbers.",
            f"Hidden_random is the mean of {found['random_sets']} sets of random words, Hidden_random-top "
            f"the one "
            "with most label loyalty.",
        ),
    ]


def _diagnosis(run: RunFolder, number: int) -> list[Markup]:
    found = run.get("diagnosis")
    pearson = found["correlation"]["pearson"]
    told = (
        "With two labels there is one pair, so no correlation."
        if len(found["label_words"]) < 3
        else f"They correlate by {decimal(pearson, 2)} over the pairs of labels."
    )
    return [
        figure(
            plots.diagnosis_figure(run.results),
            name_of("diagnosis", number),
            "Confusion told from keys, and the real one.",
            f"Left: distances of the label words' keys in layer {found['layer']}, along the "
            f"{found['directions']} "
            "directions in which queries vary most, over the largest; small: alike. Right: how well the "
            "model "
            f"tells two labels apart; small: confused. {told}",
        )
    ]


def _faithfulness(run: RunFolder, number: int) -> list[Markup]:
    found = run.get("faithfulness")
    of_means, of_prompts = found["of_means"], found["of_prompts"]
    if "flow" not in found:  # left out of results that would be too large
        return [note(f"Flow and effect have a rank correlation of {decimal(of_means['spearman'], 2)}.")]
    return [
        figure(
            plots.faithfulness_figure(run.results),
            name_of("faithfulness", number),
            "Do flows tell what their edges do?",
            "A point is all edges between two classes of tokens in one layer: their flow, and how much the "
            "loss "
            f"changes when they are cut. Rank correlation {decimal(of_means['spearman'], 2)} of means over "
            f"{found['prompts']} prompts, {decimal(of_prompts['spearman'], 2)} within a prompt.",
        )
    ]


def _many_shot(run: RunFolder, number: int) -> list[Markup]:
    return [
        figure(
            plots.many_shot_figure(run.results),
            name_of("many-shot", number),
            "Flows by the number of demonstrations.",
            "The same queries after more and more demonstrations of each class.",
        )
    ]


def _heads(run: RunFolder, number: int) -> list[Markup]:
    found = run.get("heads")
    rows = [
        [
            f"{row['layer']}.{row['head']}",
            percent(row["pq_share"], 1),
            decimal(row["function_vector"], 4),
            decimal(row["induction"], 2),
        ]
        for row in found["top"]
    ]
    agree = found["correlation"]
    return [
        figure(
            plots.heads_figure(run.results),
            name_of("heads", number),
            "Heads: flow from label words to the answer beside what else they do.",
            "A point is a head. Function-vector score: what its mean output over right prompts does to the "
            "right answer where labels are shuffled. Induction score: its attention to what followed the "
            "same token before.",
        ),
        table(
            ["layer.head", "share of S_pq", "function-vector score", "induction score"],
            rows,
            "The heads that carry most flow from label words to the answer.",
            "Rank correlation over all heads: with the function-vector score "
            f"{decimal(agree['pq_function_vector'], 2)}, with the induction score "
            f"{decimal(agree['pq_induction'], 2)}.",
        ),
    ]

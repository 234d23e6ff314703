"""Rules of answers: each obeyed by one text and broken by another, and refused where they are none."""

import pytest

from jaxlab.errors import UserError
from jaxlab.evaluation import check_rule, obeys
from jaxlab.evaluation.rules import KINDS

CASES = [
    ({"kind": "json"}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ({"kind": "words", "most": 3}, "it's well-known here", "one two three four"),
    ({"kind": "words", "least": 2}, "two words", "one"),
    ({"kind": "characters", "least": 2, "most": 4}, "abcd", "abcde"),
    ({"kind": "sentences", "least": 2, "most": 2}, "One. Two!", "One. Two. Three."),
    ({"kind": "paragraphs", "most": 2}, "a\nb\n\nc", "a\n\nb\n\nc"),
    ({"kind": "bullets", "least": 2, "most": 2}, "list:\n* a\n- b", "* a"),
    ({"kind": "keywords", "all": ["sun", "rain"]}, "Rain, then Sun.", "sunny rain"),
    ({"kind": "forbidden", "words": ["sun"]}, "sunny", "the Sun"),
    ({"kind": "times", "word": "sun", "least": 2}, "sun and SUN", "sun and sunny"),
    ({"kind": "upper"}, "LOUD 3!", "Loud"),
    ({"kind": "lower"}, "quiet, 3", "Quiet"),
    ({"kind": "starts", "text": "Dear"}, "  Dear you", "My Dear"),
    ({"kind": "ends", "text": "yours."}, "I am yours.\n", "I am yours. Bye"),
    ({"kind": "no_commas"}, "one and two", "one, two"),
    ({"kind": "quoted"}, '"said"', 'he "said"'),
    ({"kind": "title"}, "<<The sun>>\nIt shines.", "<The sun>"),
    ({"kind": "placeholders", "least": 2}, "[name] of [place]", "[name]"),
    ({"kind": "matches", "pattern": r"\d{3}"}, "call 123", "call 12"),
    ({"kind": "script", "name": "cyrillic"}, "Солнце светит ярко весь день, ok?", "Солнце shines"),
    ({"kind": "script", "name": "japanese"}, "日本語です", "日本語 desu nihongo"),
]


@pytest.mark.parametrize(
    ("rule", "obeyed", "broken"), CASES, ids=lambda x: x["kind"] if isinstance(x, dict) else ""
)
def test_a_rule_is_obeyed_or_broken(rule, obeyed, broken):
    check_rule(rule, "line 1")
    assert obeys(obeyed, rule)
    assert not obeys(broken, rule)


def test_every_rule_has_a_case():
    assert {rule["kind"] for rule, _, _ in CASES} == set(KINDS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("json", "no such rule, 'json'"),
        ({"kind": "jsno"}, "no such rule, 'jsno'; there are json"),
        ({"kind": "json", "most": 1}, "has no 'most'; it takes nothing"),
        ({"kind": "words"}, "needs least or most"),
        ({"kind": "words", "most": True}, "'most' of the rule words cannot be True"),
        ({"kind": "keywords"}, "needs 'all'"),
        ({"kind": "keywords", "all": "sun"}, "cannot be 'sun'"),
        ({"kind": "times", "least": 1}, "needs 'word'"),
        ({"kind": "matches", "pattern": "("}, r"cannot be '\('"),
        ({"kind": "script", "name": "klingon"}, "cannot be 'klingon'"),
    ],
)
def test_what_is_no_rule_is_refused(rule, message):
    with pytest.raises(UserError, match=f"line 3: .*{message}"):
        check_rule(rule, "line 3")

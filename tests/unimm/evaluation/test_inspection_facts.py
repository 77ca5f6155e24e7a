"""Facts are data for programs and words for people, from one description."""

import pytest

from unimm.evaluation.inspection_facts import Said, Section, Table, digest, size, words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12345, "12,345"),
        (True, "yes"),
        (0.25, "0.25"),
        (None, "none"),
        ((4, 8), "4 x 8"),
        (["image", "video"], "image, video"),
        ([], "none"),
        ({"top_k": 10, "scale": [1.0, 2.5]}, "top_k 10, scale 1 x 2.5"),
        (Said(1, "one"), "one"),
        (size(999), "999 B"),
        (size(1_234_567), "1.23 MB"),
        (digest("ab" * 32), "abababababab"),
    ],
)
def test_values_in_words(value: object, expected: str) -> None:
    assert words(value) == expected


@pytest.fixture
def section() -> Section:
    return Section(
        kind="thing",
        name="here",
        facts={"first fact": size(2000), "b": {"c": digest("d" * 64)}},
        tables={"long table": Table(("key", "head-width"), [("a", 1000), ("bb", None)], shown=1)},
        parts={
            "whole": Section(kind="part", facts={"n": 1}),
            "some of them": [Section(kind="one", name="x"), Section(kind="one", name="y")],
            "missing": None,
        },
        advice="do this",
    )


def test_for_programs(section: Section) -> None:
    assert section.data() == {
        "kind": "thing",
        "name": "here",
        "first_fact": 2000,
        "b": {"c": "d" * 64},
        "long_table": [{"key": "a", "head_width": 1000}, {"key": "bb", "head_width": None}],
        "whole": {"n": 1},
        "some_of_them": [{"name": "x"}, {"name": "y"}],
        "missing": None,
    }


def test_for_people(section: Section) -> None:
    assert str(section).splitlines() == [
        "thing here",
        "  first fact  2 kB",
        "  b           c dddddddddddd",
        "  key  head-width",
        "  a         1,000",
        "  and 1 more",
        "  do this",
        "",
        "part",
        "  n  1",
        "",
        "one x",
        "",
        "one y",
        "",
        "missing: none",
    ]

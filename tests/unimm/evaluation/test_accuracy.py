import json
from collections.abc import Sequence

import pytest
from PIL import Image

from unimm.evaluation.accuracy import (
    Direction,
    DirectionResult,
    accuracies,
    label,
    measure,
    read_text,
)
from unimm.signals import Document, Semantic

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _picture(digit: int) -> Image.Image:
    """A picture whose grey level says the digit."""
    return Image.new("L", (2, 2), digit)


def _read_pictures(items: Sequence[Image.Image]) -> list[int | None]:
    """None for what no digit was drawn as."""
    levels = [int(item.getextrema()[0]) for item in items]  # type: ignore[arg-type]
    return [level if level < 10 else None for level in levels]


def _draw(prompts: list[Document], direction: Direction, seeds: list[int]) -> list[Document]:
    return [[_picture(WORDS.index(str(prompt[0])))] for prompt in prompts]


TO_IMAGE = Direction(source="text", target="image", goal=0.9)
PROMPTS: list[Document] = [[WORDS[i % 10]] for i in range(100)]
DIGITS = [i % 10 for i in range(100)]


def _measure(generate, **settings) -> DirectionResult:
    return measure(TO_IMAGE, PROMPTS, DIGITS, generate, _read_pictures, **settings)


def test_a_model_without_fault_is_right_everywhere() -> None:
    result = _measure(_draw)
    assert (result.share.value, result.share.total, result.reached) == (1.0, 100, True)
    assert result.confusion == {str(digit): {str(digit): 10} for digit in range(10)}
    assert result.mistakes == ()
    assert accuracies([result]) == {"text->image": 1.0}


def test_every_kind_of_mistake_is_counted_by_its_cause() -> None:
    def flawed(prompts: list[Document], direction: Direction, seeds: list[int]) -> list[Document]:
        documents = _draw(prompts, direction, seeds)
        for row, seed in enumerate(seeds):
            if seed == 3:
                documents[row] = []
            elif seed == 14:
                documents[row] = ["three"]
            elif seed == 25:
                documents[row] = [_picture(6)]
            elif seed == 36:
                documents[row] = [_picture(99)]
            elif seed == 47:
                documents[row] = ["first words", _picture(7)]  # right, after something else
        return documents

    result = _measure(flawed, batch_size=7)
    assert result.causes == {
        "right": 96,
        "wrote nothing": 1,
        "wrote text": 1,
        "read as another": 1,
        "cannot be read": 1,
    }
    assert result.share.value == 0.96
    assert result.confusion["5"] == {"5": 9, "6": 1}
    assert result.confusion["3"] == {"3": 9, "wrote nothing": 1}
    assert [example.expected for example in result.mistakes] == [3, 4, 5, 6]
    assert [example.right for example in result.mistakes] == [False] * 4
    assert result.mistakes[1].item is None


def test_the_judge_sees_only_items_of_the_target() -> None:
    seen: list[int] = []

    def judge(items: list[Image.Image]) -> list[int | None]:
        seen.append(len(items))
        return _read_pictures(items)

    result = measure(
        TO_IMAGE, PROMPTS[:4], DIGITS[:4], lambda p, d, s: [[], ["x"], [_picture(2)], []], judge
    )
    assert seen == [1]
    assert result.share.successes == 1
    nothing = measure(TO_IMAGE, PROMPTS[:2], DIGITS[:2], lambda p, d, s: [[], []], judge)
    assert seen == [1]  # not asked at all
    assert nothing.share.value == 0.0


def test_seeds_and_figures_do_not_depend_on_the_batch_size() -> None:
    seeds: dict[int, list[int]] = {}

    def run(batch_size: int) -> DirectionResult:
        seeds[batch_size] = []

        def generate(p: list[Document], direction: Direction, given: list[int]) -> list[Document]:
            seeds[batch_size] += given
            return [[_picture(seed % 7)] for seed in given]

        return _measure(generate, batch_size=batch_size, seed=1000)

    one, many = run(1), run(64)
    assert seeds[1] == seeds[64] == list(range(1000, 1100))
    assert (one.share, one.causes, one.confusion) == (many.share, many.causes, many.confusion)


def test_examples_are_spread_over_the_prompts_and_chosen_beforehand() -> None:
    result = _measure(_draw, keep=5)
    assert [example.prompt for example in result.examples] == [
        PROMPTS[i] for i in (0, 20, 40, 60, 80)
    ]
    assert len(_measure(_draw, keep=1000).examples) == 100
    assert _measure(_draw, keep=0).examples == ()


def test_text_is_judged_by_exact_match_after_strip() -> None:
    direction = Direction(source="image", target="text")
    written: list[Document] = [["seven"], [" seven\n"], ["Seven"], ["seven eight"], [""]]
    prompts: list[Document] = [[_picture(7)]] * 5
    result = measure(direction, prompts, ["seven"] * 5, lambda p, d, s: written, read_text)
    assert result.share.successes == 2
    assert result.confusion == {"seven": {"": 1, "Seven": 1, "seven": 2, "seven eight": 1}}
    assert result.reached is None


def test_answers_of_two_parts_must_both_be_right_and_read() -> None:
    direction = Direction(source="text", target="image", name="text->film")
    answers = [(7, "left"), (7, "up"), (None, "left"), (1, "left")]
    prompts: list[Document] = [["seven left"]] * 4
    written: list[Document] = [[_picture(0)]] * 4
    result = measure(
        direction,
        prompts,
        [(7, "left")] * 4,
        lambda p, d, s: written,
        lambda items: answers,
    )
    assert result.causes == {"right": 1, "read as another": 2, "cannot be read": 1}
    assert result.confusion == {
        "7 left": {"1 left": 1, "7 left": 1, "7 up": 1, "cannot be read": 1}
    }
    assert label((None, "up")) == "? up"


def test_semantic_pictures_are_judged_as_pictures() -> None:
    direction = Direction(source="text", target="semantic")
    result = measure(
        direction, [["two"]], [2], lambda p, d, s: [[Semantic(_picture(2))]], _read_pictures
    )
    assert result.share.value == 1.0


def test_results_are_plain_json_and_progress_is_told() -> None:
    done: list[tuple[int, int]] = []
    direction = Direction(source="text", target="image", guidance=2.5, options={"top_k": 50})
    result = measure(
        direction,
        PROMPTS,
        DIGITS,
        _draw,
        _read_pictures,
        batch_size=40,
        on_batch=lambda d, n: done.append((d, n)),
    )
    assert done == [(40, 100), (80, 100), (100, 100)]
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["value"] == 1.0
    assert (stored["guidance"], stored["options"]) == (2.5, {"top_k": 50})
    assert stored["seconds"] >= 0


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 expected"):
        measure(TO_IMAGE, PROMPTS[:2], [1], _draw, _read_pictures)
    with pytest.raises(ValueError, match="at least one prompt"):
        measure(TO_IMAGE, [], [], _draw, _read_pictures)
    with pytest.raises(ValueError, match="generation gave 1 results for 100"):
        _measure(lambda p, d, s: [[]], batch_size=100)
    with pytest.raises(ValueError, match="judge gave 0 results for 1"):
        measure(TO_IMAGE, PROMPTS[:1], [0], _draw, lambda items: [])
    with pytest.raises(ValueError, match="batch_size"):
        _measure(_draw, batch_size=0)
    with pytest.raises(ValueError, match="goal must be a share"):
        Direction(source="text", target="image", goal=90)

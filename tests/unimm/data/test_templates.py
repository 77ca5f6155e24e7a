import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimm.data.media import MediaError
from unimm.data.shards import Sample, ShardReader, Stamp
from unimm.data.templates import (
    Drawing,
    Fields,
    Template,
    check_templates,
    default_templates,
    load_templates,
    make_document,
)
from unimm.signals import Audio, Semantic, Turn, Video

STAMP = Stamp(0, 0, 0)
ALL = ("text", "image", "video", "audio", "semantic")


@pytest.fixture
def sample(make: Any) -> Sample:
    files = {**make.sample(7), "gif": make.gif(0), "left.png": make.png(1, 8, 4)}
    return ShardReader(make.shard([files])).samples[0]


def kinds(document: list[Any]) -> list[Any]:
    def kind(item: Any) -> str:
        # A picture may be of its format's own class.
        return "Image" if isinstance(item, Image.Image) else type(item).__name__

    return [item if isinstance(item, str | Turn) else kind(item) for item in document]


# Documents


def test_fields_become_items(sample: Sample) -> None:
    document = make_document(sample, Template(["{txt}", "{png}", "{wav}", "{gif}", "{semantic}"]))
    word, image, audio, video, semantic = document
    assert word == "seven"
    assert isinstance(image, Image.Image)
    assert isinstance(audio, Audio)
    assert isinstance(video, Video)
    assert isinstance(semantic, Semantic)
    assert image.size == (16, 16)
    assert audio.sample_rate == 8000
    assert len(video.frames) == 5
    assert semantic.image is image


def test_kinds_stand_for_whichever_file_there_is(sample: Sample) -> None:
    document = make_document(sample, Template(["{image}", "{audio}", "{video}", "{text}"]))
    assert kinds(document)[0] == "Image"
    assert kinds(document)[1:] == ["Audio", "Video", "seven"]


def test_texts_join_and_surround_fields(sample: Sample) -> None:
    template = Template(
        ["Draw {txt}. ", "{{{json.digit}}} ", "{json.note.word}", "{left.png}", "!"]
    )
    document = make_document(sample, template)
    assert kinds(document) == ["Draw seven. {7} seven left", "Image", "!"]
    assert document[1].size == (8, 4)  # type: ignore[union-attr]


def test_turns(sample: Sample) -> None:
    template = Template(["<user>", "What is it?", "{wav}", "<assistant>", "{txt}"])
    document = make_document(sample, template)
    assert kinds(document) == [
        Turn("user"),
        "What is it?",
        "Audio",
        Turn("assistant"),
        "seven",
    ]


def test_the_condition_can_be_dropped(sample: Sample) -> None:
    template = Template(["{txt}", "It is ", "{png}"], drop_condition=0.5)
    assert kinds(make_document(sample, template, drop_condition=True)) == ["Image"]


def test_fields_of_a_sample_are_decoded_once(sample: Sample) -> None:
    fields = Fields(sample)
    first = make_document(fields, Template(["{txt}", "{png}"]))
    second = make_document(fields, Template(["{image}", "{semantic}"]))
    assert first[1] is second[0] is second[1].image  # type: ignore[union-attr]


def test_a_sample_can_give_its_own_order(make: Any) -> None:
    order = ["<user>", "Look: ", "png", "again ", "txt", "<assistant>", "wav"]
    files = {**make.sample(3), "document.json": json.dumps(order).encode()}
    sample = ShardReader(make.shard([files])).samples[0]
    document = make_document(sample, Template(["{document}"]))
    assert kinds(document) == [
        Turn("user"),
        "Look: ",
        "Image",
        "again three",
        Turn("assistant"),
        "Audio",
    ]


# Errors: one line with shard and key


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["{mp3}"], r"a template wants \{mp3\}, but the sample has only \.json, \.png, \.txt"),
        (["{right.png}"], r"a template wants \{right\.png\}"),
        (["{document}"], r"a template wants \{document\}"),
        (["{json.digits}"], r"\.json has no 'digits' .*did you mean 'digit'"),
        (["{json.note}"], r"\{json\.note\} is no text and no number"),
        (["{json.note.word.x}"], r"\.json has no 'x'"),
    ],
)
def test_what_a_sample_lacks_is_named(sample: Sample, parts: list[str], reason: str) -> None:
    with pytest.raises(MediaError, match=rf"one\.tar: sample 0000: .*{reason}"):
        make_document(sample, Template(parts))


def test_a_text_only_sample_where_a_template_wants_a_picture(make: Any) -> None:
    sample = ShardReader(make.shard([{"txt": b"seven"}])).samples[0]
    with pytest.raises(MediaError) as caught:
        make_document(sample, Template(["{txt}", "{image}"]))
    path = make.folder / "raw" / "one.tar"
    assert str(caught.value) == (
        f"{path}: sample 0000: a template wants {{image}}, but the sample has only .txt"
    )


def test_empty_texts_are_no_captions(make: Any) -> None:
    sample = ShardReader(make.shard([{"txt": b""}])).samples[0]
    with pytest.raises(MediaError, match=r"\.txt is empty"):
        make_document(sample, Template(["{txt}"]))


@pytest.mark.parametrize("order", ["{}", '["txt", 1]', '"txt"', "[]"])
def test_an_order_that_is_none(make: Any, order: str) -> None:
    files = {"txt": b"a", "document.json": order.encode()}
    sample = ShardReader(make.shard([files])).samples[0]
    with pytest.raises(MediaError, match=r"document\.json must be|empty document"):
        make_document(sample, Template(["{document}"]))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["{imgae}"], "unknown field 'imgae' .did you mean 'image'"),
        (["{jgp}"], "unknown field 'jgp' .did you mean 'jpg'"),
        (["{json.}"], "unknown field"),
        (["{}"], "unknown field ''"),
        (["{txt!r}"], "unknown field 'txt'"),
        (["{txt:>3}"], "unknown field 'txt'"),
        (["{txt"], "template part '{txt': expected '}'"),
        (["say <user>"], "a turn must be a part of its own"),
        (["{document}", "{txt}"], "must stand alone"),
        ([], "has no parts"),
    ],
)
def test_templates_are_checked_when_they_are_made(parts: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _ = Template(parts).pieces


@pytest.mark.parametrize(
    "options", [{"weight": 0}, {"weight": -1}, {"drop_condition": 1.0}, {"drop_condition": 0.1}]
)
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"weight must be|drop_condition must be"):
        Template(["{txt}"], **options)  # type: ignore[arg-type]


def test_templates_need_the_tokenizers_modalities() -> None:
    check_templates([Template(["{txt}", "{png}"])], ALL)
    with pytest.raises(ValueError, match=r"\{left\.png\} needs 'image' tokens; .* text, audio"):
        check_templates([Template(["{left.png}"])], ("text", "audio"))
    with pytest.raises(ValueError, match="needs 'semantic' tokens"):
        check_templates([Template(["{semantic}"])], ("text", "image"))
    with pytest.raises(ValueError, match="two templates are called"):
        check_templates([Template(["{txt}"]), Template(["{txt}"], weight=2)], ALL)
    with pytest.raises(ValueError, match="no templates"):
        check_templates([], ALL)


# Drawing


def samples(count: int) -> list[Sample]:
    return [Sample(Path("x/a.tar"), STAMP, f"{number:06d}", {}) for number in range(count)]


def test_draws_follow_the_weights() -> None:
    templates = [Template(["{txt}"], weight=3), Template(["{png}"]), Template(["{wav}"], weight=2)]
    for per_sample in (1, 4):
        draw = Drawing(templates, per_sample)
        counts = Counter(d.template.label for s in samples(2000) for d in draw(s))
        total = 2000 * per_sample
        assert sum(counts.values()) == total
        for template in templates:
            assert abs(counts[template.label] / total - template.weight / 6) < 0.03


def test_draws_are_fixed_by_seed_shard_and_key() -> None:
    templates = [Template(["{txt}", "{png}"], drop_condition=0.3), Template(["{png}", "{txt}"])]

    def draws(seed: int, shard: str) -> list[Any]:
        draw = Drawing(templates, 1, seed)
        return [draw(Sample(Path(shard), STAMP, s.key, {})) for s in samples(50)]

    assert draws(0, "x/a.tar") == draws(0, "y/a.tar")
    assert draws(0, "x/a.tar") != draws(1, "x/a.tar")
    assert draws(0, "x/a.tar") != draws(0, "x/b.tar")


def test_conditions_are_dropped_as_often_as_asked() -> None:
    draw = Drawing([Template(["{txt}", "{png}"], drop_condition=0.2)], 1)
    share = sum(d.drop_condition for s in samples(3000) for d in draw(s)) / 3000
    assert abs(share - 0.2) < 0.03


def test_none_writes_every_template_once() -> None:
    templates = [Template(["{txt}"], weight=100), Template(["{png}"])]
    assert [d.template for d in Drawing(templates, None)(samples(1)[0])] == templates
    with pytest.raises(ValueError, match="documents_per_sample: at least 1"):
        Drawing(templates, 0)


def test_everything_that_decides_draws_is_in_the_digest() -> None:
    base = Drawing([Template(["{txt}"])], 1, 0).digest
    others = [
        Drawing([Template(["{png}"])], 1, 0),
        Drawing([Template(["{txt}"], weight=2)], 1, 0),
        Drawing([Template(["{txt}"])], 2, 0),
        Drawing([Template(["{txt}"])], 1, 1),
    ]
    assert Drawing([Template(["{txt}"])], 1, 0).digest == base
    assert base not in {other.digest for other in others}


# Files and defaults


def test_templates_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text('- {parts: ["{txt}", "{png}"], weight: 2, drop_condition: 0.1}\n')
    assert load_templates(path) == [Template(["{txt}", "{png}"], 2, None, 0.1)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "- {parts: ['{txt}'], wieght: 2}",
            "template 0: unknown key 'wieght' .did you mean",
        ),
        ("- {parts: [{txt}]}", "template 0: parts must be a list of strings"),
        ("- {parts: ['{imgae}']}", "template 0: .*did you mean 'image'"),
        ("- {weight: 2}", "template 0: has no parts"),
        ("- {parts: ['{txt}'], weight: much}", "template 0: "),
        ("parts: ['{txt}']", "expected a list of templates"),
        ("", "expected a list of templates"),
        ("- [", "not valid YAML"),
        ("- !!python/object/apply:os.system ['touch owned']", "not valid YAML"),
    ],
)
def test_damaged_template_files(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}: {reason}"):
        load_templates(path)
    assert not Path("owned").exists()


def test_a_missing_template_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the file is missing"):
        load_templates(tmp_path / "no.yaml")


def test_defaults_follow_the_first_sample(sample: Sample, make: Any) -> None:
    parts = [template.parts for template in default_templates(sample, ("text", "image", "audio"))]
    both_ways = [["{txt}", "{image}"], ["{image}", "{txt}"]]
    assert parts == [*both_ways, ["{txt}", "{audio}"], ["{audio}", "{txt}"]]
    assert [t.parts for t in default_templates(sample, ("text",))] == [["{txt}"]]
    bare = ShardReader(make.shard([{"png": make.png(0)}], "bare.tar")).samples[0]
    assert [t.parts for t in default_templates(bare, ("text", "image"))] == [["{image}"]]
    with pytest.raises(ValueError, match="nothing that the tokenizer writes"):
        default_templates(bare, ("text", "audio"))


# Orders and captions that are drawn


def test_parts_come_in_a_drawn_order(sample: Sample) -> None:
    template = Template(["{txt}", "{png}", "{wav}"], shuffle=True)
    orders = Counter(
        tuple(str(kind) for kind in kinds(make_document(sample, template, seed=seed)))
        for seed in range(300)
    )
    assert len(orders) == 6
    assert min(orders.values()) > 25
    last = kinds(make_document(sample, template, drop_condition=True, seed=3))
    assert last == kinds(make_document(sample, template, seed=3))[-1:]
    assert kinds(make_document(sample, template, seed=9)) == kinds(
        make_document(sample, template, seed=9)
    )


@pytest.mark.parametrize("parts", [["{txt}"], ["<user>", "{txt}", "<assistant>", "{png}"]])
def test_what_has_no_other_order_is_not_shuffled(parts: list[str]) -> None:
    with pytest.raises(ValueError, match="shuffle needs two parts or more, and no turns"):
        Template(parts, shuffle=True)


def test_one_of_several_captions_is_drawn(make: Any) -> None:
    files = {"json": json.dumps({"captions": ["one", "two", 3], "none": []}).encode()}
    (sample,) = ShardReader(make.shard([files])).samples
    template = Template(["{json.captions}"])
    drawn = Counter(make_document(sample, template, seed=seed)[0] for seed in range(300))
    assert set(drawn) == {"one", "two", "3"}
    assert min(drawn.values()) > 70
    with pytest.raises(MediaError, match=r"\{json\.none\} is no text and no number: \[\]"):
        make_document(sample, Template(["{json.none}"]))


def test_documents_of_one_sample_draw_differently(make: Any) -> None:
    files = {"json": json.dumps({"captions": [str(n) for n in range(50)]}).encode()}
    (sample,) = ShardReader(make.shard([files])).samples
    drawing = Drawing([Template(["{json.captions}"])], documents_per_sample=8)
    documents = [make_document(sample, d.template, seed=d.seed)[0] for d in drawing(sample)]
    assert len(set(documents)) > 4
    again = [make_document(sample, d.template, seed=d.seed)[0] for d in drawing(sample)]
    assert documents == again


def test_an_option_that_is_off_leaves_the_digest_as_it_was() -> None:
    """Token shards that were made before the option came are still theirs."""
    plain = Drawing([Template(["{txt}", "{png}"])])
    assert plain.digest.startswith("7b5bb528c1a0")
    shuffled = Drawing([Template(["{txt}", "{png}"], shuffle=True)])
    assert shuffled.digest != plain.digest

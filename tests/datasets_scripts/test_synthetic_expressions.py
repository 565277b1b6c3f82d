"""Synthetic sentences: true of exactly their objects, each word needed; checked again by plain means on the masks."""

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest

from visa_hf.datasets_scripts.synthetic import ClipOptions, SyntheticClip, make_clip
from visa_hf.datasets_scripts.synthetic_dice import Dice
from visa_hf.datasets_scripts.synthetic_drawing import outline_shapes
from visa_hf.datasets_scripts.synthetic_expressions import IDEAS, SyntheticExpression, make_expressions
from visa_hf.datasets_scripts.synthetic_facts import Facts, members
from visa_hf.datasets_scripts.synthetic_meanings import plain_words
from visa_hf.datasets_scripts.synthetic_measures import Measures
from visa_hf.datasets_scripts.synthetic_motion import DIRECTIONS, Path
from visa_hf.datasets_scripts.synthetic_scene import ATTRIBUTES, PILLAR, Backdrop, Look, Scene, Shape
from visa_hf.datasets_scripts.synthetic_words import CONCEPTS, inflected, noun_phrase

NUM_CLIPS = 90


@cache
def clips() -> tuple[SyntheticClip, ...]:
    """Clips of all levels, some of them stills, at 72 x 88 pixels."""
    moving = ClipOptions(size=(72, 88), num_frames=(14, 18), num_expressions=14)
    still = ClipOptions(size=(72, 88), num_frames=(1, 1), num_expressions=14)
    return tuple(make_clip(11, k, options=still if k % 6 == 0 else moving) for k in range(NUM_CLIPS))


def expressions() -> list[tuple[SyntheticClip, SyntheticExpression]]:
    return [(clip, expression) for clip in clips() for expression in clip.expressions]


def facts_of(scene: Scene) -> Facts:
    labels, silhouettes = outline_shapes(scene)
    return Facts([shape.look for shape in scene.shapes], Measures(scene, labels, silhouettes))


def scene_of(*shapes: tuple[Look, Path], size: tuple[int, int] = (100, 100)) -> Scene:
    """A scene by hand."""
    num_frames = len(shapes[0][1].centers)
    backdrop = Backdrop("plain", (128, 128, 128), (128, 128, 128), (0.0, 0.0), 0.0, 0)
    dressed = tuple(Shape(look, path, (255, 0, 0), (0, 0, 0), 0.6, 0, 0) for look, path in shapes)
    return Scene(size, num_frames, dressed, backdrop)


def path(start: tuple[float, float], end: tuple[float, float], radius: float = 8.0, num_frames: int = 16) -> Path:
    tau = np.linspace(0, 1, num_frames)[:, None]
    centers = np.array(start) * (1 - tau) + np.array(end) * tau
    return Path(centers, np.full(num_frames, radius), np.zeros(num_frames))


RED, BLUE, GREEN = Look("red", "circle", "plain"), Look("blue", "square", "plain"), Look("green", "star", "plain")


# Each sentence is true of its objects and of nothing else


def test_each_sentence_is_clearly_true_of_its_objects_and_clearly_false_of_all_others() -> None:
    for clip in clips():
        facts = facts_of(clip.scene)
        for expression in clip.expressions:
            bits = sum(1 << thing for thing in expression.objects)
            assert facts.truth(expression.meaning) == (bits, bits), expression
            assert (expression.type_id == 2) == (bits == 0)


def test_each_part_of_a_conjunction_is_needed() -> None:
    num_near_misses = num_without = 0
    for clip in clips():
        facts = facts_of(clip.scene)
        for expression in clip.expressions:
            name, *parts = expression.meaning
            if name != "and" or expression.idea == "except" or parts[0] != ("shape",):
                continue
            rest = [("and", parts[0], *parts[1:k], *parts[k + 1 :]) for k in range(1, len(parts))]
            fits = [facts.truth(program)[0].bit_count() > len(expression.objects) for program in rest]
            if expression.objects or len(parts) > 2:
                assert all(fits), expression
            num_near_misses += expression.type_id == 2 and len(parts) > 2
            num_without += expression.type_id == 2
    assert num_near_misses >= 0.6 * num_without > 0


def test_all_types_and_ideas_occur_and_no_type_is_rare() -> None:
    counts = Counter((expression.type_id, expression.idea) for _, expression in expressions())
    by_type = Counter(expression.type_id for _, expression in expressions())
    total = sum(by_type.values())
    assert all(by_type[type_id] >= 0.12 * total for type_id in (0, 1, 2))
    referring = {"look", "motion", "border", "place", "relation", "occlusion", "overtaking", "size", "speed"}
    assert {idea for type_id, idea in counts if type_id == 0} == referring | {"all", "group", "pair", "except"}
    reasoning = {"knowledge", "knowledge and event", "order", "memory", "metaphor", "hiding", "overtaking", "size"}
    assert {idea for type_id, idea in counts if type_id == 1} == reasoning | {"speed", "odd one out", "likeness"}
    assert {"look", "motion", "knowledge", "relation", "occlusion"} <= {idea for kind, idea in counts if kind == 2}


def test_sentences_of_a_clip_differ_and_are_well_formed() -> None:
    for clip in clips():
        texts = [expression.text for expression in clip.expressions]
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert text == " ".join(text.split()) and text == text.lower()
            assert not set(text) & set("|{}[]"), text
            assert text.startswith(("the ", "all ", "both ", "which ", "what ", "every ")), text
            assert text.endswith("?") == text.startswith(("which ", "what ")), text


def test_meanings_survive_json() -> None:
    for _, expression in expressions()[:50]:
        listed = json.loads(json.dumps(expression.meaning))
        assert to_tuple(listed) == expression.meaning


def to_tuple(value: object) -> object:
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


def test_answers_say_what_is_asked_for_and_then_what_the_objects_look_like_before_they_show_them() -> None:
    for clip, expression in expressions():
        told = expression.told
        assert expression.answer == f"{plain_words(expression.meaning).capitalize()}. {told}"
        if not expression.objects:
            assert told == "No such thing is there."
            continue
        assert told.startswith("It is the ") and told.endswith(" [SEG].")
        for thing in expression.objects:
            look = clip.objects[thing]
            words = f"{look.color} {look.form}" if look.form == PILLAR else f"{look.texture} {look.color} {look.form}"
            assert words in told


def test_each_clip_has_a_sentence_about_all_shapes_whose_answer_names_them_from_left_to_right() -> None:
    clip = make_clip(0, 3, options=ClipOptions(size=(64, 96), num_frames=(1, 1), levels=(1,)))
    first, *others = clip.expressions
    assert first.idea == "all" and first.objects == tuple(range(len(clip.objects)))
    assert all(expression.idea != "all" for expression in others)
    columns = [np.nonzero(mask[0])[1].mean() for mask in clip.masks]
    looks = [clip.objects[thing] for thing in np.argsort(columns)]
    *names, last = [f"the {look.texture} {look.color} {look.form}" for look in looks]
    assert first.answer == f"All shapes. It is {', '.join(names)} and {last} [SEG]."


GREEN_SHAPE = ("and", ("shape",), ("color", "green"))


@pytest.mark.parametrize(
    ("meaning", "words"),
    [
        (("and", ("shape",)), "all shapes"),
        (("and", ("shape",), ("color", "red"), ("texture", "striped")), "the striped red shape"),
        (("and", ("shape",), ("form", "star"), ("moves", "down left")), "the star moving down and to the left"),
        (("and", ("shape",), ("concept", "zebra"), ("still",)), "the striped shape standing still"),
        (("and", ("shape",), ("concept", "roll"), ("color", "blue")), "the blue circle or ring"),
        (("and", ("shape",), ("hides",)), "the shape that hides something else"),
        (("and", ("shape",), ("vanishes",)), "the shape that vanishes behind something and comes back"),
        (("and", ("shape",), ("unlike", "color")), "the shape with another colour than the others"),
        (
            ("and", ("shape",), ("related", "same form", GREEN_SHAPE)),
            "the shape with the same form as the green shape",
        ),
        (("and", ("shape",), ("related", "behind", ("form", "pillar"))), "the shape partly hidden by the pillar"),
        (("most", "size", -1, GREEN_SHAPE), "the smallest green shape"),
        (("most", "speed", 1, ("and", ("shape",), ("moving",))), "the fastest shape"),
        (
            ("most", "x first", 1, ("and", ("shape",), ("texture", "plain"), ("seen in", 0))),
            "the plain shape furthest to the right at the beginning",
        ),
        (("most", "exit", -1, ("and", ("shape",), ("leaves",))), "the shape first to leave the picture"),
        (
            ("and", ("shape",), ("color", "red"), ("most", "exit", 1, ("leaves",))),
            "the red shape last to leave the picture",
        ),
        (("and", ("shape",), ("not", GREEN_SHAPE)), "the shape other than the green shape"),
        (("or", GREEN_SHAPE, ("and", ("shape",), ("color", "blue"))), "the blue shape and the green shape"),
    ],
)
def test_what_is_asked_for_is_said_in_words_for_what_is_to_be_seen(meaning, words) -> None:
    assert plain_words(meaning) == words


def test_every_meaning_has_plain_words_that_do_not_depend_on_how_the_sentence_is_worded() -> None:
    for _, expression in expressions():
        words = plain_words(expression.meaning)
        assert words.startswith(("the ", "all shapes")) and "|" not in words and "{" not in words
        # Nothing that takes knowledge or a figure of speech is left in them.
        assert not any(word in words for word in ("like", "colour of", "seems", "would", "could"))


# The same again by plain means: the masks alone


def centers(masks: np.ndarray) -> dict[int, np.ndarray]:
    """Return the middle (x, y) of the visible pixels, by frame."""
    return {t: np.argwhere(mask).mean(axis=0)[::-1] for t, mask in enumerate(masks) if mask.any()}


def test_looks_are_those_of_the_objects() -> None:
    checked = 0
    for clip, expression in expressions():
        if expression.idea in ("look", "group"):
            wanted = dict(part for part in expression.meaning[1:] if part[0] in ATTRIBUTES)
            fitting = [
                thing
                for thing, look in enumerate(clip.objects)
                if look.form != PILLAR and all(getattr(look, name) == value for name, value in wanted.items())
            ]
            assert list(expression.objects) == fitting
            for value in wanted.values():
                stem = {"striped": "strip", "dotted": "dot"}.get(value, value)
                assert stem in expression.text
            checked += 1
    assert checked > 50


def test_directions_are_those_in_which_the_masks_move() -> None:
    checked = 0
    for clip, expression in expressions():
        parts = [part for part in expression.meaning[1:] if isinstance(part, tuple) and part[0] == "moves"]
        if not parts or expression.meaning[0] != "and":
            continue
        for thing in expression.objects:
            places = list(centers(clip.masks[thing]).values())
            way = places[-1] - places[0]
            assert way @ np.array(DIRECTIONS[parts[0][1]]) > 0, expression.text
            checked += 1
    assert checked > 30


def test_the_first_to_leave_is_the_first_whose_mask_ends() -> None:
    checked = 0
    for clip, expression in expressions():
        if expression.meaning == ("most", "exit", -1, ("and", ("shape",), ("leaves",))):
            last = {thing: max(centers(masks)) for thing, masks in enumerate(clip.masks)}
            (thing,) = expression.objects
            assert last[thing] < len(clip.frames) - 1
            rivals = [
                frame
                for other, frame in last.items()
                # What is hidden at the end has not left.
                if other != thing and clip.objects[other].form != PILLAR and not is_hidden_at_the_end(clip, other)
            ]
            assert last[thing] < min(rivals)
            checked += 1
    assert checked >= 3


def is_hidden_at_the_end(clip: SyntheticClip, thing: int) -> bool:
    x, y = clip.scene.shapes[thing].path.centers[-1]
    height, width = clip.scene.size
    return 0 <= x < width and 0 <= y < height and not clip.masks[thing, -1].any()


def test_the_largest_has_the_most_pixels_where_nothing_hides_it() -> None:
    checked = 0
    for clip, expression in expressions():
        if expression.meaning == ("most", "size", 1, ("and", ("shape",))):
            (thing,) = expression.objects
            most = clip.masks.sum(axis=(2, 3)).max(axis=1)
            others = [most[k] for k, look in enumerate(clip.objects) if k != thing and look.form != PILLAR]
            if np.argmax(most) == thing:
                assert most[thing] > max(others)
                checked += 1
    assert checked >= 5


# Judgements on scenes made by hand


def test_overtaking_is_seen_in_the_one_that_passes() -> None:
    facts = facts_of(scene_of((RED, path((10, 50), (90, 50))), (BLUE, path((30, 40), (60, 40)))))
    assert facts.truth(("overtakes",)) == (0b01, 0b01)
    assert facts.truth(("overtaken",)) == (0b10, 0b10)
    assert facts.truth(("related", "overtakes", ("color", "blue"))) == (0b01, 0b01)
    against = facts_of(scene_of((RED, path((10, 50), (90, 50))), (BLUE, path((60, 40), (30, 40)))))
    assert against.truth(("overtakes",)) == (0, 0)
    resting = facts_of(scene_of((RED, path((10, 50), (90, 50))), (BLUE, path((50, 40), (50, 40)))))
    assert resting.truth(("overtakes",)) == (0, 0)


def test_leaving_and_its_order() -> None:
    facts = facts_of(
        scene_of(
            (RED, path((50, 20), (150, 20))),
            (BLUE, path((80, 50), (180, 50))),
            (GREEN, path((30, 80), (60, 80))),
        )
    )
    assert facts.truth(("leaves",)) == (0b011, 0b011)
    assert facts.truth(("leaves to", "right")) == (0b011, 0b011)
    assert facts.truth(("enters",)) == (0, 0)
    assert facts.truth(("most", "exit", -1, ("leaves",))) == (0b010, 0b010)
    assert facts.truth(("most", "exit", 1, ("leaves",))) == (0b001, 0b001)


def test_the_first_of_the_red_ones_may_be_the_second_of_all() -> None:
    scene = scene_of(
        (RED, path((50, 20), (140, 20))),
        (BLUE, path((80, 50), (180, 50))),
        (Look("red", "star", "plain"), path((30, 80), (118, 80))),
    )
    facts = facts_of(scene)
    assert facts.truth(("most", "exit", -1, ("and", ("color", "red"), ("leaves",)))) == (0b001, 0b001)
    texts = {e.text: e.objects for seed in range(60) for e in make_expressions(facts, Dice(seed), 12)}
    firsts = {text: things for text, things in texts.items() if "first" in text}
    assert any("red" in text for text in firsts)
    assert all(things == ((0,) if "red" in text else (1,)) for text, things in firsts.items() if "leave" in text)


def test_what_stops_half_way_out_has_neither_left_nor_stayed() -> None:
    facts = facts_of(scene_of((RED, path((50, 20), (100, 20))), (BLUE, path((20, 80), (30, 80)))))
    assert facts.truth(("leaves",)) == (0, 0b01)


def test_hiding_goes_by_the_order_of_painting() -> None:
    facts = facts_of(scene_of((RED, path((50, 50), (50, 50))), (BLUE, path((10, 50), (90, 50), radius=9))))
    assert facts.truth(("hidden",)) == (0b01, 0b01)
    assert facts.truth(("hides",)) == (0b10, 0b10)
    assert facts.truth(("related", "behind", ("form", "square"))) == (0b01, 0b01)


def test_a_slow_slant_is_neither_left_nor_right_nor_up() -> None:
    facts = facts_of(scene_of((RED, path((20, 50), (60, 30))), (BLUE, path((20, 80), (60, 80)))))
    assert facts.truth(("moves", "right")) == (0b10, 0b11)
    assert facts.truth(("moves", "left")) == (0, 0)
    assert facts.truth(("moving",)) == (0b11, 0b11)


def test_sizes_that_hardly_differ_are_not_compared() -> None:
    close = facts_of(scene_of((RED, path((30, 30), (30, 30), 10)), (RED, path((70, 70), (70, 70), 10.8))))
    assert close.truth(("most", "size", 1, ("shape",))) == (0, 0b11)
    apart = facts_of(scene_of((RED, path((30, 30), (30, 30), 10)), (RED, path((70, 70), (70, 70), 14))))
    assert apart.truth(("most", "size", 1, ("shape",))) == (0b10, 0b10)


def test_arguable_knowledge_is_left_open() -> None:
    facts = facts_of(
        scene_of(
            (Look("red", "ellipse", "plain"), path((20, 20), (20, 20))),
            (RED, path((50, 50), (50, 50))),
            (BLUE, path((80, 80), (80, 80))),
        )
    )
    assert facts.truth(("concept", "roll")) == (0b010, 0b011)
    assert facts.truth(("unlike", "color")) == (0b100, 0b100)


def test_not_and_or() -> None:
    facts = facts_of(scene_of((RED, path((20, 20), (20, 20))), (BLUE, path((80, 80), (80, 80)))))
    assert facts.truth(("not", ("color", "red"))) == (0b10, 0b10)
    assert facts.truth(("or", ("color", "red"), ("form", "square"))) == (0b11, 0b11)
    assert facts.truth(("and", ("color", "red"), ("form", "square"))) == (0, 0)


def test_making_sentences_twice_gives_the_same() -> None:
    scene = clips()[1].scene
    assert make_expressions(facts_of(scene), Dice(1), 8) == make_expressions(facts_of(scene), Dice(1), 8)


def test_ideas_are_drawn_as_often_as_asked() -> None:
    def ideas(weights: dict[str, float] | None) -> Counter[str]:
        some = [clip.scene for clip in clips()[1:12] if len(clip.frames) > 1]
        made = (make_expressions(facts_of(scene), Dice(k), 12, weights) for k, scene in enumerate(some))
        return Counter(expression.idea for expressions in made for expression in expressions)

    usual, often, never = ideas(None), ideas({"place": 9.0}), ideas({"look": 0.0, "knowledge": 0.0})
    assert often["place"] >= 2 * usual["place"] > 0
    assert usual["look"] > 0 and usual["knowledge"] > 0 and never["look"] == never["knowledge"] == 0
    assert ideas({"look": 2.0}) == usual  # what it is anyway


def test_plain_sentences_are_drawn_as_often_as_asked() -> None:
    def num_looks(look_weight: float) -> float:
        made = (make_expressions(facts_of(clip.scene), Dice(k), 12, None, look_weight) for k, clip in enumerate(some))
        places = [expression for expressions in made for expression in expressions if expression.idea == "place"]
        assert len(places) >= 10
        meanings = "".join(json.dumps(place.meaning) for place in places)
        return sum(meanings.count(f'["{name}", ') for name in ATTRIBUTES) / len(places)

    some = clips()[:24]
    assert num_looks(0.05) < 0.5 * num_looks(1.0)


def test_every_idea_is_known() -> None:
    assert {expression.idea for _, expression in expressions()} == {*IDEAS, "all"}


# Words


def test_concepts_name_values_that_exist() -> None:
    for concept in CONCEPTS.values():
        known = set(ATTRIBUTES[concept.attribute])
        assert concept.values and set(concept.values) <= known and set(concept.arguable) <= known
        assert not set(concept.values) & set(concept.arguable)


@pytest.mark.parametrize(
    ("words", "singular", "plural"),
    [
        ("moves|move left", "moves left", "move left"),
        ("could roll", "could roll", "could roll"),
        ("is a wheel || are wheels", "is a wheel", "are wheels"),
    ],
)
def test_verbs_have_two_numbers(words: str, singular: str, plural: str) -> None:
    assert inflected(words, is_plural=False) == singular
    assert inflected(words, is_plural=True) == plural


def test_noun_phrases() -> None:
    class Never(Dice):
        def chance(self, probability: float) -> bool:
            return False

    assert noun_phrase({"color": "red", "texture": "striped"}, "shape", Never(0)) == ("striped red shape", "")
    assert noun_phrase({"form": "cross"}, "shape", Never(0), is_plural=True) == ("crosses", "")


def test_dice_are_fixed_for_ever() -> None:
    dice = Dice("visa", 1)
    assert [dice.below(100) for _ in range(4)] == list(FIRST_THROWS)
    assert sorted(dice.shuffled("abcd")) == list("abcd")
    assert list(members(0b1010)) == [1, 3]


# random.Random("visa:1"), four times int(100 * random()).
FIRST_THROWS = (5, 23, 60, 2)

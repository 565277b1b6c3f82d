"""Samples follow the published recipe, hold the right masks, and are a function of (seed, draw) alone."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from tests.datasets_scripts.training_rows import (
    SIZE,
    conversation_row,
    conversations_of,
    expression_row,
    expressions_of,
    mask_row,
    masks_of,
    object_mask,
    reason_rows,
    rows_of,
    small_world,
    write_video,
)
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.features import EXPRESSION_FEATURES, VIDEO_FEATURES
from visa_hf.datasets_scripts.frame_store import FrameError
from visa_hf.datasets_scripts.samples import ConversationSource, ExpressionSource, Sample
from visa_hf.datasets_scripts.sampling import (
    PADDING_COLOUR,
    SamplingRecipe,
    draw_frames,
    pad_to_square,
    random_generator,
)
from visa_hf.modeling.prompts_visa import ANSWER_TEMPLATES, QUESTION_TEMPLATES
from visa_hf.rle import encode_mask

OWN_FEATURES = Features(
    {
        **EXPRESSION_FEATURES,
        "annotated": List(Value("int32")),
        "answer": Value("string"),
        "explanation": Value("string"),
    }
)


def draw_many(source: ExpressionSource | ConversationSource, count: int, seed: int = 0) -> list[Sample]:
    return [source.sample(random_generator(seed, draw), draw) for draw in range(count)]


def within(count: int, total: int, probability: float) -> bool:
    """Whether a count is within 4 standard deviations of what is expected."""
    return abs(count - total * probability) < 4 * (total * probability * (1 - probability)) ** 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ExpressionSource:
    root = tmp_path_factory.mktemp("world")
    return ExpressionSource("world", *small_world(root), root)


@pytest.fixture(scope="module")
def drawn(world: ExpressionSource) -> list[Sample]:
    return draw_many(world, 600)


# numbers


def test_random_numbers_are_a_function_of_seed_draw_and_attempt() -> None:
    numbers = {key: tuple(random_generator(*key).integers(2**63, size=4)) for key in np.ndindex(3, 20, 3)}
    assert len(set(numbers.values())) == len(numbers)
    assert numbers[1, 7, 2] == tuple(random_generator(1, 7, 2).integers(2**63, size=4))
    assert numbers[1, 7, 0] == tuple(random_generator(1, 7).integers(2**63, size=4))
    # Draw numbers of different seeds never meet, as they would if the two were added.
    assert numbers[0, 1, 0] != numbers[1, 0, 0]


def test_random_numbers_are_those_of_philox() -> None:
    expected = np.random.Generator(np.random.Philox(counter=0, key=[5, 11])).random(3)
    np.testing.assert_array_equal(random_generator(5, 11).random(3), expected)


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64), (0, 0, -1)])
def test_numbers_out_of_range_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0 and below 2\*\*64"):
        random_generator(*numbers)


def test_the_global_random_state_is_neither_read_nor_moved(world: ExpressionSource) -> None:
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = world.sample(random_generator(0, 3), 3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert world.sample(random_generator(0, 3), 3).reference_idx == first.reference_idx


# frames


def test_one_reference_comes_from_each_equal_part_and_the_target_is_one_of_them() -> None:
    recipe, counts, targets, firsts = SamplingRecipe(), Counter(), Counter(), Counter()
    for draw in range(6000):
        target, references = draw_frames(random_generator(1, draw), 60, recipe)
        count = len(references)
        assert target in references
        assert all(60 * part // count <= idx < 60 * (part + 1) // count for part, idx in enumerate(references))
        counts[count] += 1
        targets[target] += 1
        if count == 10:
            firsts[references[0]] += 1
    assert sorted(counts) == [8, 9, 10, 11, 12] and all(within(number, 6000, 1 / 5) for number in counts.values())
    assert sorted(targets) == list(range(60)) and all(within(number, 6000, 1 / 60) for number in targets.values())
    assert all(within(firsts[idx], counts[10], 1 / 6) for idx in range(6))


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8])
def test_a_short_clip_gives_all_its_frames(num_frames: int) -> None:
    targets = set()
    for draw in range(200):
        target, references = draw_frames(random_generator(0, draw), num_frames, SamplingRecipe())
        assert references == tuple(range(num_frames))
        targets.add(target)
    assert targets == set(range(num_frames))


def test_a_clip_shorter_than_the_number_drawn_gives_all_and_a_longer_one_as_many_as_drawn() -> None:
    lengths = {len(draw_frames(random_generator(0, draw), 10, SamplingRecipe())[1]) for draw in range(200)}
    assert lengths == {8, 9, 10}


def test_there_may_be_no_references_at_all() -> None:
    recipe = SamplingRecipe(min_reference_frames=0, max_reference_frames=0)
    drawn = [draw_frames(random_generator(0, draw), 5, recipe) for draw in range(100)]
    assert {target for target, _ in drawn} == set(range(5)) and {references for _, references in drawn} == {()}


def test_only_allowed_frames_become_the_target() -> None:
    targets = Counter(
        draw_frames(random_generator(0, draw), 50, SamplingRecipe(), [3, 17, 18])[0] for draw in range(900)
    )
    assert sorted(targets) == [3, 17, 18] and all(within(number, 900, 1 / 3) for number in targets.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_reference_frames": -1}, ValueError, "`min_reference_frames` is -1 but must be at least 0"),
        ({"min_reference_frames": 13}, ValueError, "`max_reference_frames` is 12, less than"),
        ({"foreign_probability": 1.5}, ValueError, r"must lie in \[0, 1\]"),
        ({"foreign_probability": float("nan")}, ValueError, r"must lie in \[0, 1\]"),
        ({"expressions_per_video": 2.0}, TypeError, "must be an integer"),
        ({"expressions_per_video": True}, TypeError, "must be an integer"),
        ({"lower_case": "yes"}, TypeError, "must be true or false"),
        ({"text_only_probability": "0.1"}, TypeError, "must be a number"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingRecipe(**options)


def test_the_default_recipe_is_the_published_one() -> None:
    recipe = SamplingRecipe()
    assert (recipe.min_reference_frames, recipe.max_reference_frames, recipe.expressions_per_video) == (8, 12, 3)
    assert (recipe.foreign_probability, recipe.text_only_probability, recipe.explanation_probability) == (
        0.05,
        0.1,
        0.5,
    )


# samples of videos


def test_a_sample_holds_the_frames_that_it_names(drawn: list[Sample]) -> None:
    for draw, sample in enumerate(drawn):
        video = int(sample.video_id.removeprefix("video"))
        assert sample.draw == draw and sample.source == "world"
        assert sample.target_frame.shape == (*SIZE, 3) and sample.target_frame.dtype == np.uint8
        assert [(int(f[0, 0, 0]), int(f[0, 0, 1])) for f in sample.reference_frames] == [
            (video, idx) for idx in sample.reference_idx
        ]
        if not sample.is_foreign_target:
            assert sample.target_idx in sample.reference_idx
            assert tuple(sample.target_frame[0, 0, :2]) == (video, sample.target_idx)
            assert any(frame is sample.target_frame for frame in sample.reference_frames), "it is decoded once"


def test_a_mask_is_the_union_of_the_objects_that_the_expression_names(drawn: list[Sample]) -> None:
    objects_of = {"The Thing 0": [0], "The Thing 1?": [1], "The Thing 2": [0, 2], "The Thing 3": []}
    seen = Counter()
    for sample in drawn:
        for conversation in sample.conversations:
            expected = np.zeros(SIZE, dtype=bool)
            for number in objects_of[conversation.query]:
                is_hidden = number == 1 and (sample.target_idx or 0) % 2
                if not sample.is_foreign_target and not is_hidden:
                    expected |= object_mask(number, sample.target_idx)
            assert conversation.masks.dtype == np.uint8 and conversation.masks.shape == (1, *SIZE)
            np.testing.assert_array_equal(conversation.masks[0], expected)
            seen[conversation.query] += 1
    assert len(seen) == 4


def test_up_to_three_different_expressions_share_a_sample_and_each_is_as_likely(drawn: list[Sample]) -> None:
    queries = Counter()
    for sample in drawn:
        said = [conversation.query for conversation in sample.conversations]
        assert len(said) == len(set(said)) == 3
        queries.update(said)
    assert all(within(number, len(drawn), 3 / 4) for number in queries.values())


def test_videos_and_templates_are_drawn_alike_and_published_text_stays_as_it_is(drawn: list[Sample]) -> None:
    videos = Counter(sample.video_id for sample in drawn)
    assert all(within(number, len(drawn), 1 / 4) for number in videos.values())
    said = [conversation for sample in drawn for conversation in sample.conversations]
    assert {c.query for c in said} == {"The Thing 0", "The Thing 1?", "The Thing 2", "The Thing 3"}
    assert all(c.style is None and c.answer is None and c.history == () for c in said)
    long = Counter(c.template for c in said if c.query.endswith("?"))
    short = Counter(c.template for c in said if not c.query.endswith("?"))
    assert sorted(long) == [0, 1] and all(within(number, long.total(), 1 / 2) for number in long.values())
    assert sorted(short) == [0, 1, 2] and all(within(number, short.total(), 1 / 3) for number in short.values())
    answers = Counter(c.answer_template for c in said)
    assert sorted(answers) == list(range(len(ANSWER_TEMPLATES)))
    assert all(within(number, len(said), 1 / 4) for number in answers.values())


def test_one_sample_in_twenty_has_a_target_of_another_video(world: ExpressionSource, drawn: list[Sample]) -> None:
    foreign = [sample for sample in drawn if sample.is_foreign_target]
    assert within(len(foreign), len(drawn), 0.05)
    for sample in foreign:
        assert sample.target_idx is None
        assert f"video{sample.target_frame[0, 0, 0]}" != sample.video_id
        assert not any(conversation.masks.any() for conversation in sample.conversations)
    always = ExpressionSource.__new__(ExpressionSource)
    always.__dict__.update(world.__dict__, recipe=SamplingRecipe(foreign_probability=1.0))
    origins = Counter(
        (sample.video_id, int(sample.target_frame[0, 0, 0])) for sample in draw_many(always, 300, seed=4)
    )
    assert len(origins) == 12 and all(within(number, 300, 1 / 12) for number in origins.values())


def test_a_foreign_target_has_masks_of_its_own_size_and_a_single_video_never_has_one(tmp_path: Path) -> None:
    frames = [write_video(tmp_path, 0, 3), write_video(tmp_path, 1, 3, (10, 12))]
    rows = [expression_row(0, 0, frames[0], [0], "a"), expression_row(1, 0, frames[1], [0], "b", (10, 12))]
    masks = masks_of([mask_row(0, 0, 3), mask_row(1, 0, 3, size=(10, 12))])
    always = SamplingRecipe(foreign_probability=1.0)
    for sample in draw_many(ExpressionSource("two", expressions_of(rows), masks, tmp_path, always), 20):
        assert sample.is_foreign_target
        assert sample.conversations[0].masks.shape == (1, *sample.target_frame.shape[:2])
        assert sample.target_frame.shape != sample.reference_frames[0].shape
    alone = ExpressionSource("one", expressions_of(rows[:1]), masks, tmp_path, always)
    assert not any(sample.is_foreign_target for sample in draw_many(alone, 20))


def test_the_same_draw_is_the_same_sample_also_after_pickling(world: ExpressionSource) -> None:
    again = pickle.loads(pickle.dumps(world))
    for draw in (0, 5, 5, 1):
        one, two = (source.sample(random_generator(7, draw), draw) for source in (world, again))
        assert repr(one) == repr(two)
        np.testing.assert_array_equal(one.target_frame, two.target_frame)
        for a, b in zip(one.conversations, two.conversations, strict=True):
            np.testing.assert_array_equal(a.masks, b.masks)


def test_short_videos_are_left_out_when_the_recipe_says_so(tmp_path: Path) -> None:
    expressions, masks = small_world(tmp_path, (1, 4, 1, 2))
    assert len(ExpressionSource("all", expressions, masks, tmp_path)) == 4
    source = ExpressionSource("long", expressions, masks, tmp_path, SamplingRecipe(min_video_frames=2))
    assert len(source) == 2
    assert {sample.video_id for sample in draw_many(source, 40)} == {"video1", "video3"}
    with pytest.raises(ValueError, match="Source `long` .*: all its 4 videos have fewer than 9 frames"):
        ExpressionSource("long", expressions, masks, tmp_path, SamplingRecipe(min_video_frames=9))


def test_rows_in_any_order_and_selections_of_rows_give_the_right_masks(tmp_path: Path) -> None:
    expressions, masks = small_world(tmp_path, (6, 5, 4))
    shuffled = ExpressionSource("s", expressions.shuffle(seed=1), masks.shuffle(seed=2), tmp_path)
    assert len(shuffled) == 3
    part = expressions.filter(lambda row: row["expression_id"] == "2")
    source = ExpressionSource("part", part, masks.shuffle(seed=3), tmp_path, SamplingRecipe(foreign_probability=0))
    for sample in draw_many(source, 30):
        (conversation,) = sample.conversations
        expected = object_mask(0, sample.target_idx) | object_mask(2, sample.target_idx)
        np.testing.assert_array_equal(conversation.masks[0], expected)
    for sample in draw_many(shuffled, 60):
        for conversation in sample.conversations:
            if conversation.query == "The Thing 0" and not sample.is_foreign_target:
                np.testing.assert_array_equal(conversation.masks[0], object_mask(0, sample.target_idx))


# images


def test_an_image_is_its_own_reference_and_lower_case_is_an_option(tmp_path: Path) -> None:
    expressions, masks = small_world(tmp_path, (1, 1))
    recipe = SamplingRecipe(lower_case=True, foreign_probability=0)
    for sample in draw_many(ExpressionSource("images", expressions, masks, tmp_path, recipe), 20):
        assert (sample.target_idx, sample.reference_idx, len(sample.reference_frames)) == (0, (0,), 1)
        assert all(c.query.startswith("the thing") for c in sample.conversations)


def reason_source(root: Path, recipe: SamplingRecipe, explanation: str | None, is_sentence: bool) -> ExpressionSource:
    frames = write_video(root, 0, 1)
    more = {"is_sentence": is_sentence, "explanation": explanation}
    rows = [expression_row(0, number, frames, [number], f"The Query {number}.", **more) for number in range(4)]
    masks = masks_of([mask_row(0, number, 1) for number in range(4)])
    return ExpressionSource("reason_seg", reason_rows(rows), masks, root, recipe)


@pytest.mark.parametrize(
    ("is_sentence", "style", "query"), [(True, "long", "The Query"), (False, "short", "the query")]
)
def test_a_flag_chooses_the_form_and_only_a_sentence_keeps_its_capitals(
    tmp_path: Path, is_sentence: bool, style: str, query: str
) -> None:
    for sample in draw_many(reason_source(tmp_path, SamplingRecipe(), None, is_sentence), 60):
        for conversation in sample.conversations:
            assert conversation.style == style and conversation.query.startswith(query)
            assert conversation.answer is None and conversation.masks.shape == (1, *SIZE)
            assert 0 <= conversation.template < len(QUESTION_TEMPLATES[style])


def test_explained_images_take_three_forms_in_the_published_shares(tmp_path: Path) -> None:
    source = reason_source(tmp_path, SamplingRecipe(), "Because it is so.", False)
    forms = Counter()
    for sample in draw_many(source, 800):
        (style,) = {conversation.style for conversation in sample.conversations}
        forms[style] += 1
        for conversation in sample.conversations:
            number = int(conversation.query[-2])
            if style == "conversation":
                assert conversation.query == f"The Query {number}." and conversation.answer == "Because it is so."
                assert conversation.masks is None and conversation.answer_template is None
                assert sample.target_frame is None and sample.target_idx is None
                assert sample.reference_idx == (0,) and len(sample.reference_frames) == 1
                continue
            assert conversation.query == f"the query {number}."
            np.testing.assert_array_equal(conversation.masks[0], object_mask(number, 0))
            if style == "explanatory":
                opening = conversation.answer.removesuffix(" Because it is so.")
                assert opening in ANSWER_TEMPLATES and conversation.answer_template is None
            else:
                assert conversation.answer is None
    assert sorted(forms) == ["conversation", "explanatory", "short"]
    assert within(forms["conversation"], 800, 0.1)
    assert within(forms["explanatory"], 800, 0.45) and within(forms["short"], 800, 0.45)


def test_a_text_only_sample_speaks_only_of_what_is_explained(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 1)
    rows = [
        expression_row(0, number, frames, [0], f"q{number}", is_sentence=False, explanation=why)
        for number, why in enumerate(("so", None, ""))
    ]
    source = ExpressionSource("r", reason_rows(rows), masks_of([mask_row(0, 0, 1)]), tmp_path)
    styles = set()
    for sample in draw_many(source, 200):
        said = {c.query: c.style for c in sample.conversations}
        styles.add(said["q0"])
        assert said == (
            {"q0": "conversation"} if sample.target_frame is None else said | {"q1": "short", "q2": "short"}
        )
    assert styles == {"conversation", "explanatory", "short"}


# your own data


def own_source(root: Path, rows: list[dict], num_objects: int = 3, length: int = 20) -> ExpressionSource:
    masks = masks_of([mask_row(0, number, length) for number in range(num_objects)])
    return ExpressionSource("own", expressions_of(rows, OWN_FEATURES), masks, root)


def own_row(frames: list[str], number: int, objects: list[int], **more: object) -> dict:
    return expression_row(
        0, number, frames, objects, f"own {number}", **{"annotated": None, "answer": None, "explanation": None, **more}
    )


def test_every_annotated_frame_is_a_target_and_of_expressions_that_know_it_alone(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 20)
    annotated = {"own 0": {2, 5, 9}, "own 1": {5, 9, 11}, "own 2": {19}}
    rows = [own_row(frames, number, [number], annotated=sorted(annotated[f"own {number}"])) for number in range(3)]
    together, targets = Counter(), Counter()
    for sample in draw_many(own_source(tmp_path, rows), 200):
        queries = frozenset(conversation.query for conversation in sample.conversations)
        assert all(sample.target_idx in annotated[query] for query in queries)
        assert sample.target_idx in sample.reference_idx
        together[queries] += 1
        targets[sample.target_idx] += 1
    assert set(together) == {frozenset(names) for names in (("own 0", "own 1"), ("own 0",), ("own 1",), ("own 2",))}
    assert set(targets) == {2, 5, 9, 11, 19}


def test_an_expression_without_annotated_frames_is_refused(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 20)
    rows = [own_row(frames, 0, [0], annotated=[3]), own_row(frames, 1, [0], annotated=[])]
    with pytest.raises(AnnotationError, match="video 'video0', expression '1': No frame is annotated"):
        own_source(tmp_path, rows)


def test_an_answer_of_its_own_is_given_and_each_seg_has_its_mask(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 20)
    rows = [
        own_row(frames, 0, [0, 1], answer="Both, [SEG].", explanation="never said"),
        own_row(frames, 1, [2, 0], answer="First [SEG], then [SEG]."),
        own_row(frames, 2, [], answer="There is none."),
    ]
    for sample in draw_many(own_source(tmp_path, rows), 20):
        t = sample.target_idx
        said = {conversation.query: conversation for conversation in sample.conversations}
        assert {c.answer for c in said.values()} == {row["answer"] for row in rows}
        assert all(c.answer_template is None and c.style is None for c in said.values())
        np.testing.assert_array_equal(said["own 0"].masks, (object_mask(0, t) | object_mask(1, t))[None])
        np.testing.assert_array_equal(said["own 1"].masks, [object_mask(2, t), object_mask(0, t)])
        assert said["own 2"].masks is None


def test_an_answer_with_a_wrong_number_of_seg_is_refused(tmp_path: Path) -> None:
    rows = [own_row(write_video(tmp_path, 0, 20), 0, [0], answer="[SEG] and [SEG]")]
    with pytest.raises(AnnotationError, match=r"expression '0': Source `own`: Its answer has 2 \[SEG\] but 1 objects"):
        draw_many(own_source(tmp_path, rows), 1)


def test_a_foreign_target_takes_the_own_answer_only_where_there_is_no_object(tmp_path: Path) -> None:
    frames = [write_video(tmp_path, 0, 5), write_video(tmp_path, 1, 5)]
    rows = [
        own_row(frames[0], 0, [0], answer="The red one, [SEG]."),
        own_row(frames[0], 1, [], answer="There is none."),
        own_row(frames[1], 0, [], answer="There is none.") | {"video_id": "video1"},
    ]
    source = ExpressionSource(
        "own",
        expressions_of(rows, OWN_FEATURES),
        masks_of([mask_row(0, 0, 5)]),
        tmp_path,
        SamplingRecipe(foreign_probability=1),
    )
    answers = {(c.query, c.answer) for sample in draw_many(source, 40) for c in sample.conversations}
    assert answers == {("own 0", None), ("own 1", "There is none."), ("own 0", "There is none.")}


# conversations


def test_a_conversation_keeps_its_rounds_and_has_neither_target_nor_mask(tmp_path: Path) -> None:
    turns = [("What is it?", "A cat."), ("Where?", "On the mat."), ("Why?", "It is warm.")]
    rows = [conversation_row(0, write_video(tmp_path, 0, 1), turns)]
    for sample in draw_many(ConversationSource("vqa", conversations_of(rows), tmp_path), 5):
        (conversation,) = sample.conversations
        assert (conversation.query, conversation.answer) == ("Why?", "It is warm.")
        assert conversation.history == tuple(turns[:-1])
        assert (conversation.style, conversation.masks, conversation.answer_template) == ("conversation", None, None)
        assert sample.target_frame is None and sample.target_idx is None and not sample.is_foreign_target
        assert sample.reference_idx == (0,) and sample.reference_frames[0].shape == (*SIZE, 3)


def test_chat_univi_keeps_the_last_round_and_pads_to_a_square(tmp_path: Path) -> None:
    rows = [conversation_row(7, write_video(tmp_path, 7, 40, (10, 17)), [("a", "b"), ("c", "d")])]
    recipe = SamplingRecipe(pad_to_square=True, last_turn_only=True)
    counts = set()
    for sample in draw_many(ConversationSource("chatunivi", conversations_of(rows), tmp_path, recipe), 60):
        (conversation,) = sample.conversations
        assert (conversation.query, conversation.answer, conversation.history) == ("c", "d", ())
        counts.add(len(sample.reference_frames))
        for idx, frame in zip(sample.reference_idx, sample.reference_frames, strict=True):
            assert frame.shape == (17, 17, 3)
            assert (frame[3:13] == (7, idx, 0)).all()
            assert (frame[:3] == PADDING_COLOUR).all() and (frame[13:] == PADDING_COLOUR).all()
    assert counts == {8, 9, 10, 11, 12}


def test_a_conversation_about_no_frame_is_text(tmp_path: Path) -> None:
    rows = [conversation_row(0, [], [("What is 2 + 2?", "4")])]
    (sample,) = draw_many(ConversationSource("scienceqa", conversations_of(rows), tmp_path), 1)
    assert sample.reference_frames == () and sample.reference_idx == () and sample.conversations[0].style == "text"


def test_a_conversation_without_turns_is_named(tmp_path: Path) -> None:
    rows = [conversation_row(3, [], [])]
    with pytest.raises(AnnotationError, match="Source `vqa`: conversation 'c3' has no turns"):
        draw_many(ConversationSource("vqa", conversations_of(rows), tmp_path), 1)


def test_padding_by_hand() -> None:
    frame = np.full((2, 5, 3), 9, dtype=np.uint8)
    square = pad_to_square(frame)
    np.testing.assert_array_equal(square[:, 0, 0], [122, 9, 9, 122, 122])
    np.testing.assert_array_equal(square[0, 0], [122, 116, 104])
    np.testing.assert_array_equal(pad_to_square(frame.transpose(1, 0, 2)), square.transpose(1, 0, 2))
    assert pad_to_square(square) is square


# what does not fit together


def test_rows_that_do_not_fit_together_are_refused_at_once(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 3)
    row, mask = expression_row(0, 0, frames, [0], "a"), mask_row(0, 0, 3)
    unknown = expression_row(0, 5, frames, [0, 9], "b")
    with pytest.raises(AnnotationError, match="video 'video0', expression '5': `anno_id` '0_9' has no mask"):
        ExpressionSource("s", expressions_of([row, unknown]), masks_of([mask]), tmp_path)
    with pytest.raises(AnnotationError, match="`anno_id` '0_0' is there twice"):
        ExpressionSource("s", expressions_of([row]), masks_of([mask, mask]), tmp_path)
    for masks in (None, masks_of([])):
        with pytest.raises(ValueError, match="The expressions mean objects, but there are no masks"):
            ExpressionSource("s", expressions_of([row]), masks, tmp_path)
    with pytest.raises(AnnotationError, match="expression '0': The row names no frames"):
        ExpressionSource("s", expressions_of([row | {"frames": []}]), masks_of([mask]), tmp_path)
    with pytest.raises(ValueError, match="Source `s` has no rows to draw from"):
        ExpressionSource("s", expressions_of([]), masks_of([mask]), tmp_path)
    with pytest.raises(ValueError, match="The data set has no column `video_id`, but 'anno_id'"):
        ExpressionSource("s", masks_of([mask]).select_columns(["anno_id"]), masks_of([mask]), tmp_path)


def test_expressions_of_no_object_need_no_masks(tmp_path: Path) -> None:
    row = expression_row(0, 0, write_video(tmp_path, 0, 3), [], "a unicorn")
    for sample in draw_many(ExpressionSource("s", expressions_of([row]), None, tmp_path), 5):
        assert sample.conversations[0].masks.shape == (1, *SIZE) and not sample.conversations[0].masks.any()


def test_a_mask_that_does_not_fit_its_frame_is_named(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 1)
    row = expression_row(0, 4, frames, [0], "a")
    where = r"video 'video0', expression '4', frame 'JPEGImages/video0/00000.png': Source `s`: The mask '0_0' "

    def sample_with(mask: dict, rows: list[dict] | None = None) -> None:
        draw_many(ExpressionSource("s", expressions_of(rows or [row]), masks_of([mask]), tmp_path), 1)

    with pytest.raises(AnnotationError, match=where + r"has size \(9, 9\) \(H, W\), but the picture \(24, 32\)"):
        sample_with(mask_row(0, 0, 1, size=(9, 9)))
    with pytest.raises(AnnotationError, match=where + "has 2 entries for 1 frames"):
        sample_with(mask_row(0, 0, 2))
    damaged = mask_row(0, 0, 1)
    damaged["rle"][0]["counts"] = damaged["rle"][0]["counts"][:-2]
    with pytest.raises(AnnotationError, match=where + "is damaged: .*`counts` end in the middle"):
        sample_with(damaged)
    other = expression_row(0, 5, frames * 2, [0], "b")
    with pytest.raises(AnnotationError, match="Its frames are others than those of another expression"):
        sample_with(mask_row(0, 0, 1), [row, other])


def foregrounds_of(rows: list[dict]) -> Dataset:
    others = {"height": SIZE[0], "width": SIZE[1], "frames": [], "foreground_ratio": []}
    return rows_of([{**others, **row} for row in rows], VIDEO_FEATURES)


def test_a_sample_knows_the_foreground_of_its_target_and_the_types_of_its_expressions(tmp_path: Path) -> None:
    expressions, masks = small_world(tmp_path, (3, 2))
    union = [np.logical_or(object_mask(0, t), object_mask(2, t)) for t in range(3)]
    # Nothing is published about the other video; in frame 2 there is nothing.
    rles = [encode_mask(union[0]), encode_mask(union[1]), None]
    rows = [{"video_id": "video1", "foreground_rle": []}, {"video_id": "video0", "foreground_rle": rles}]
    recipe = SamplingRecipe(foreign_probability=0.2)
    source = ExpressionSource("s", expressions, masks, tmp_path, recipe, videos=foregrounds_of(rows))
    seen = set()
    for sample in draw_many(pickle.loads(pickle.dumps(source)), 60):
        if sample.is_foreign_target or sample.video_id == "video1":
            assert sample.foreground is None
        else:
            expected = union[sample.target_idx] if sample.target_idx < 2 else np.zeros(SIZE, bool)
            assert sample.foreground.dtype == np.uint8
            np.testing.assert_array_equal(sample.foreground, expected)
            seen.add(sample.target_idx)
        for conversation in sample.conversations:
            is_absent = conversation.query == "The Thing 3"
            assert conversation.type_id == (None if sample.is_foreign_target else 2 if is_absent else 0)
    assert seen == {0, 1, 2}
    assert all(
        sample.foreground is None for sample in draw_many(ExpressionSource("s", expressions, masks, tmp_path), 5)
    )


def test_a_foreground_that_does_not_fit_its_frame_is_named(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 1)
    expressions = expressions_of([expression_row(0, 4, frames, [], "a")])
    for rles, message in (
        ([encode_mask(np.ones((9, 9), bool))], r"frame '.*00000.png': Source `s`: The foreground has size \(9, 9\)"),
        ([None, None], "The foreground has 2 entries for 1 frames"),
    ):
        videos = foregrounds_of([{"video_id": "video0", "foreground_rle": rles}])
        with pytest.raises(AnnotationError, match=message):
            draw_many(ExpressionSource("s", expressions, None, tmp_path, videos=videos), 1)


def test_a_missing_frame_is_named(tmp_path: Path) -> None:
    frames = write_video(tmp_path, 0, 1)
    source = ExpressionSource(
        "s", expressions_of([expression_row(0, 0, frames, [0], "a")]), masks_of([mask_row(0, 0, 1)]), tmp_path
    )
    (tmp_path / frames[0]).unlink()
    with pytest.raises(FrameError, match="Frame `JPEGImages/video0/00000.png` is missing"):
        draw_many(source, 1)
    Image.new("L", (1, 1)).save(tmp_path / frames[0])
    with pytest.raises(AnnotationError, match=r"but the picture \(1, 1\)"):
        draw_many(source, 1)

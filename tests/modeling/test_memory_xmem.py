import math

import pytest
import torch

from visa_hf.modeling import memory_xmem
from visa_hf.modeling.memory_xmem import XMemMemory, similarity, top_k_softmax, weighted_sum

SETTINGS = {
    "memory_every": 1,
    "deep_update_every": -1,
    "top_k": None,
    "use_long_term": True,
    "count_long_term_usage": True,
    "min_working_frames": 2,
    "max_working_frames": 4,
    "num_prototypes": 1,
    "max_long_term_elements": 3,
}


def make_memory(**settings) -> XMemMemory:
    return XMemMemory(**{**SETTINGS, **settings})


def plane(*numbers: float) -> torch.Tensor:
    """One channel, one row of positions."""
    return torch.tensor(numbers).reshape(1, 1, -1)


def add(memory: XMemMemory, keys: tuple[float, ...], *values: tuple[float, ...]) -> None:
    """Memorise a frame with one-channel keys, shrinkage and selection 1, and one-channel values per object."""
    ones = torch.ones_like(plane(*keys))
    memory.add(plane(*keys), ones, ones, torch.stack([plane(*value) for value in values]))


def read(memory: XMemMemory, *keys: float) -> torch.Tensor:
    """(N, positions)."""
    return memory.read(plane(*keys), torch.ones_like(plane(*keys)))[:, 0, 0]


def test_similarity_and_affinity_of_two_elements_and_one_position_by_hand():
    key = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    shrinkage = torch.tensor([[1.0], [2.0]])
    frame_key, selection = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.5]])
    # element 0: -(1 * 1 + 0.5 * 1) * 1 / sqrt 2; element 1: -(0 + 0.5 * 1) * 2 / sqrt 2
    expected = torch.tensor([[-1.5 / math.sqrt(2), -1 / math.sqrt(2)]])
    found = similarity(key, shrinkage, frame_key, selection)
    torch.testing.assert_close(found, expected)
    affinity, elements = top_k_softmax(found, None)
    second = 1 / (1 + math.exp(-0.5 / math.sqrt(2)))
    torch.testing.assert_close(affinity, torch.tensor([[1 - second, second]]))
    assert elements is None


def test_similarity_works_on_batches():
    generator = torch.Generator().manual_seed(0)
    key, frame_key, selection = (torch.rand(2, n, 4, generator=generator) for n in (5, 3, 3))
    shrinkage = 1 + torch.rand(2, 5, 1, generator=generator)
    found = similarity(key, shrinkage, frame_key, selection)
    for i in range(2):
        torch.testing.assert_close(found[i], similarity(key[i], shrinkage[i], frame_key[i], selection[i]))


def test_softmax_is_over_the_best_elements_only_and_clamped_to_those_there_are():
    similarities = torch.tensor([[-3.0, -1.0, -2.0]])
    affinity, elements = top_k_softmax(similarities, 2)
    dense = torch.zeros(1, 3).scatter_(1, elements, affinity)
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(dense, torch.tensor([[0.0, first, 1 - first]]))
    affinity, elements = top_k_softmax(similarities, 30)
    torch.testing.assert_close(affinity, similarities.softmax(dim=1))
    assert elements is None


def test_distant_elements_still_give_numbers():
    affinity, _ = top_k_softmax(torch.tensor([[-2e4, -1e4, -3e4]]), 2)
    torch.testing.assert_close(affinity.sum(dim=1), torch.ones(1))


def test_weighted_sum_of_chosen_elements_is_the_dense_product():
    generator = torch.Generator().manual_seed(0)
    similarities, value = torch.randn(7, 20, generator=generator), torch.randn(20, 6, generator=generator)
    affinity, elements = top_k_softmax(similarities, 5)
    dense = torch.zeros(7, 20).scatter_(1, elements, affinity)
    torch.testing.assert_close(weighted_sum(affinity, elements, value), dense @ value)


def test_reading_before_anything_is_memorised_is_an_error():
    memory = make_memory()
    with pytest.raises(RuntimeError, match="Nothing has been memorised yet. Give a mask first"):
        read(memory, 0.0)
    with pytest.raises(RuntimeError, match="Nothing has been memorised yet"):
        _ = memory.sensory


def test_reading_gives_the_affinity_weighted_value_of_each_object():
    memory = make_memory()
    add(memory, (0.0, 2.0), (1.0, 5.0), (10.0, 20.0))
    far = math.exp(-4) / (1 + math.exp(-4))
    expected = torch.tensor([[1 + 4 * far, 5 - 4 * far], [10 + 10 * far, 20 - 10 * far]])
    torch.testing.assert_close(read(memory, 0.0, 2.0), expected)


def test_consolidation_by_hand():
    memory = make_memory()
    for key, value in ((0.0, 1.0), (1.0, 2.0), (3.0, 4.0)):
        add(memory, (key,), (value,))
        read(memory, 1.0)
    assert (memory.num_working, memory.num_long_term) == (3, 0)
    # The fourth frame fills the memory: the first and the last stay, 1 and 3 are candidates and 1 was used more.
    add(memory, (10.0,), (8.0,))
    assert (memory.num_working, memory.num_long_term) == (2, 1)
    torch.testing.assert_close(memory._elements.key.flatten(), torch.tensor([1.0, 0.0, 10.0]))
    near = 1 / (1 + math.exp(-4))
    torch.testing.assert_close(memory._groups[0].value.flatten(), torch.tensor([2 * near + 4 * (1 - near), 1.0, 8.0]))
    torch.testing.assert_close(memory._elements.shrinkage.flatten(), torch.ones(3))


def fill_long_term(memory: XMemMemory, num_frames: int, read_at: float | None) -> None:
    for i in range(num_frames):
        add(memory, (float(i),), (float(i),))
        if read_at is not None:
            read(memory, read_at)


def test_the_least_used_long_term_elements_go_first():
    memory = make_memory(max_working_frames=3, top_k=2)
    fill_long_term(memory, 12, read_at=1.0)
    assert memory.num_long_term <= 3
    # Key 1 is what every frame asks for.
    assert 1.0 in memory._elements.key[: memory.num_long_term].flatten().tolist()


def test_the_oldest_long_term_elements_go_first_where_usage_is_not_counted():
    memory = make_memory(max_working_frames=3, count_long_term_usage=False)
    fill_long_term(memory, 12, read_at=1.0)
    # Frame 0 and the last stay in working memory; each frame between became a prototype, the last three are kept.
    assert memory._elements.key.flatten().tolist() == [8.0, 9.0, 10.0, 0.0, 11.0]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("bound", [8, 11, 24])
def test_memory_stays_within_its_bounds_with_several_groups_of_objects(counted, bound):
    generator = torch.Generator().manual_seed(0)
    memory = make_memory(
        top_k=5,
        min_working_frames=2,
        max_working_frames=6,
        num_prototypes=8,
        max_long_term_elements=bound,
        count_long_term_usage=counted,
    )
    height, width = 2, 3
    num_objects, largest = 1, 0
    for frame_idx in range(400):
        if frame_idx in (1, 50, 51, 200):
            num_objects += 2
        key, selection = torch.rand(2, 4, height, width, generator=generator)
        shrinkage = 1 + torch.rand(1, height, width, generator=generator)
        if frame_idx:
            readout = memory.read(key, selection)
            assert readout.shape[1:] == (3, height, width)
            assert torch.isfinite(readout).all()
        memory.add(key, shrinkage, selection, torch.rand(num_objects, 3, height, width, generator=generator))
        assert memory.num_working < 6 * height * width
        assert memory.num_long_term <= bound
        largest = max(largest, memory.num_long_term)
        for group in memory._groups:
            assert group.num_long_term <= memory.num_long_term
            assert height * width <= group.num_working <= memory.num_working
    assert largest > 0
    assert readout.shape[0] == 9
    assert len(memory._groups) == 5


def test_without_long_term_memory_every_memory_frame_is_kept():
    memory = make_memory(use_long_term=False)
    fill_long_term(memory, 30, read_at=1.0)
    assert (memory.num_working, memory.num_long_term) == (30, 0)


def test_few_candidates_give_as_many_prototypes():
    memory = make_memory(max_working_frames=3, num_prototypes=100, max_long_term_elements=100)
    fill_long_term(memory, 3, read_at=0.0)
    assert (memory.num_working, memory.num_long_term) == (2, 1)


def test_late_objects_read_only_what_they_have_values_for():
    memory = make_memory()
    add(memory, (0.0,), (1.0,))
    add(memory, (5.0,), (2.0,), (7.0,))
    readout = read(memory, 0.0)
    near = 1 / (1 + math.exp(-25))
    torch.testing.assert_close(readout, torch.tensor([[near + 2 * (1 - near)], [7.0]]))


def test_a_large_frame_is_read_in_slices_with_the_same_result(monkeypatch):
    results = []
    for limit in (2**25, 50):
        monkeypatch.setattr(memory_xmem, "_MAX_SIMILARITIES", limit)
        generator = torch.Generator().manual_seed(0)
        memory = make_memory(top_k=3)
        key, selection = torch.rand(2, 4, 3, 5, generator=generator)
        memory.add(key, 1 + torch.rand(1, 3, 5, generator=generator), selection, torch.zeros(2, 6, 3, 5))
        memory._groups[0].value = torch.rand(15, 12, generator=generator)
        results.append((memory.read(key, selection), memory._elements.usage))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    # Every position gives away an affinity of 1.
    torch.testing.assert_close(results[0][1].sum(), torch.tensor(15.0))


def test_usage_is_the_affinity_that_each_element_got():
    memory = make_memory(top_k=1)
    add(memory, (0.0, 4.0, 8.0), (0.0, 0.0, 0.0))
    read(memory, 0.0, 1.0, 7.0)
    assert memory._elements.usage.tolist() == [2.0, 0.0, 1.0]
    torch.testing.assert_close(memory._elements.age, torch.ones(3))

"""The numbers of a request reach the device in one copy."""

import pytest
import torch

from faster_chatglm_6b.decoding.numbers import RequestNumbers
from faster_chatglm_6b.decoding.request import MOST_END_TOKENS

CPU = torch.device("cpu")
NAMES = ("temperature", "top_k", "minimum_eos", "eos_ids", "finished", "first_key", "sop_slot", "last_row", "seed")


@pytest.mark.parametrize("batch", [1, 3, 33])
def test_tensors_keep_their_alignment_whatever_the_batch(batch):
    numbers = RequestNumbers(batch, CPU)
    starts = {name: numbers[name].storage_offset() * numbers[name].element_size() for name in NAMES}
    assert all(start % 16 == 0 for start in starts.values()), starts
    assert len(set(starts.values())) == len(NAMES)
    assert numbers["finished"].shape == numbers["first_key"].shape == (batch,)


def test_nothing_arrives_before_it_is_sent():
    numbers = RequestNumbers(2, CPU)
    numbers.set(temperature=0.5, first_key=[3, 4], seed=2**62 - 1, top_k=7)
    assert not numbers["temperature"].any() and not numbers["first_key"].any()
    numbers.send()
    assert numbers["temperature"].tolist() == [0.5, 0.5] and numbers["first_key"].tolist() == [3, 4]
    assert numbers["seed"].tolist() == 2 * [2**62 - 1] and numbers["top_k"].tolist() == [7, 7]


def test_what_a_kernel_changed_is_set_again():
    numbers = RequestNumbers(2, CPU)
    numbers.set(step=0, finished=0)
    numbers["step"].add_(5)
    numbers["finished"].fill_(1)
    numbers.send()
    assert numbers["step"].tolist() == numbers["finished"].tolist() == [0, 0]


def test_fewer_numbers_than_rows_are_those_of_the_first():
    numbers = RequestNumbers(4, CPU)
    numbers.set(finished=1)
    numbers.set(finished=[0, 0, 0])
    numbers.send()
    assert numbers["finished"].tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError):
        numbers.set(finished=[0] * 5)


def test_fewer_ids_leave_none_of_the_request_before():
    numbers = RequestNumbers(2, CPU)
    numbers.set_ids("eos_ids", tuple(range(MOST_END_TOKENS)))
    numbers.set_ids("eos_ids", (9,))
    numbers.send()
    assert numbers["eos_ids"].tolist() == 2 * [[9] + [-1] * (MOST_END_TOKENS - 1)]
    with pytest.raises(ValueError):
        numbers.set_ids("eos_ids", tuple(range(MOST_END_TOKENS + 1)))


@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_of_some_rows_leave_those_of_others_and_of_all_rows(batch):
    numbers = RequestNumbers(batch, CPU, {"pages": (torch.int32, 5), "bias": (torch.float32, 1)}, end_tokens=7)
    numbers.set(step=1, turn=0, pad_id=3, pages=-1)
    numbers.send()
    for name in ("step", "turn", "pages", "seed"):
        # As kernels and other requests change them.
        numbers[name].add_(10)
    row = batch - 1
    numbers.set_row(row, step=4, pages=[8, 9], seed=-5, bias=0.25)
    numbers.set_ids("eos_ids", (6, 7), row)
    numbers.send_rows([row])
    assert numbers["step"].tolist() == [*[11] * row, 4] and numbers["seed"].tolist() == [*[10] * row, -5]
    assert numbers["pages"].tolist() == [*[[9] * 5] * row, [8, 9, -1, -1, -1]]
    assert numbers["bias"][row] == 0.25 and numbers["eos_ids"][row].tolist() == [6, 7, *[-1] * 5]
    assert numbers["turn"].tolist() == [10] and numbers["pad_id"].tolist() == [3]

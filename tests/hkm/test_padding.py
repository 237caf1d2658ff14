"""What is padding is compared once a step, whatever layer asks."""

import pytest
import torch

from hillinfer.hkm.padding import Padding
from hillinfer_core.errors import UnsupportedModel


def mask(*rows):
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def test_each_layer_of_a_step_has_the_same_answer_and_the_first_records_it():
    padding = Padding()
    text = mask("00111", "11111")
    for _ in range(3):
        assert padding.step(text, 5, 5).tolist() == text.tolist()
    assert [padding.tokens(row, 5) for row in range(2)] == [3, 5]
    longer = mask("001111", "111111")
    for _ in range(3):
        assert padding.step(longer, 6, 1).tolist() == [[True], [True]]
    # Another tensor that says the same.
    assert padding.step(longer.clone(), 6, 1).tolist() == [[True], [True]]
    assert [padding.tokens(row, 6) for row in range(2)] == [4, 6]


@pytest.mark.parametrize("other", [mask("011111", "111111"), mask("001111", "111011"), None])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_is_given_another_mask_is_refused(other, layer):
    padding = Padding()
    padding.step(mask("00111", "11111"), 5, 5)
    if layer:
        padding.step(mask("001111", "111111"), 6, 1)
    with pytest.raises(
        UnsupportedModel, match="hides tokens that the cache holds, or shows what was padding"
    ):
        padding.step(other, 6, 1)


def test_masks_of_other_sizes_and_padding_at_the_end_are_refused():
    padding = Padding()
    with pytest.raises(UnsupportedModel, match="has 4 columns and the cache 5"):
        padding.step(mask("0111"), 5, 5)
    with pytest.raises(UnsupportedModel, match="pad on the left"):
        padding.step(mask("01110"), 5, 5)
    assert padding.tokens(0, 5) == 5


def test_after_a_crop_the_columns_that_are_gone_may_be_otherwise():
    padding = Padding()
    padding.step(mask("01101"), 5, 5)
    padding.crop(3)
    again = mask("01111")
    assert padding.step(again, 5, 2).tolist() == [[True, True]]
    assert padding.tokens(0, 5) == 4


def test_without_padding_no_mask_and_one_of_all_columns_say_the_same():
    padding = Padding()
    for columns, given in ((3, None), (4, mask("1111")), (5, None)):
        for _ in range(2):
            visible = padding.step(given, columns, columns if columns == 3 else 1)
            assert visible is None or visible.all()
    assert padding.tokens(0, 5) == 5

"""Tables of factors: when they are cached, rebuilt and forgotten, what is checked, which tensors share one."""

import pytest
import torch
from launching import randn

from lora_fast.kernels import pointer_table
from lora_fast.kernels.pairs import gram

pytestmark = pytest.mark.gpu


def test_table_is_cached_until_an_address_or_a_shape_changes():
    def find(a):
        return pointer_table.find_tables([[a, b]], [True, False])[0].factors

    a, b = randn(4, 16), randn(8, 4)
    first = find(a)
    assert find(a) is first
    moved = a.clone()
    second = find(moved)
    assert second is not first and second.entries[0, 0] == moved.data_ptr()
    assert find(moved.view(16, 4)) is not second, "the address is the same, but not the shape"


def test_cache_forgets_the_oldest_tables():
    tensors = [randn(4, 16, seed=i) for i in range(2 * pointer_table.CACHE_SIZE)]
    for tensor in tensors:
        pointer_table.find_tables([[tensor]], [True])
    assert len(pointer_table._recent["tables", tensors[0].device]) == pointer_table.CACHE_SIZE


def test_strides_are_checked_where_the_table_is_cached():
    storage = randn(16, 16)
    gram.factor_grams([storage], [True])
    with pytest.raises(AssertionError, match="expected contiguous"):
        gram.factor_grams([storage.T], [True])


def test_misaligned_tensors_get_a_table_of_their_own():
    """The other tensors are still read 16 bytes at a time."""
    odd_row, odd_start = randn(4, 9), torch.cat([randn(1), randn(64)])[1:].view(16, 4)
    factors = [randn(4, 16), odd_row, randn(50, 4), odd_start]
    is_a = [True, True, False, False]
    tables = [table.factors for table in pointer_table.find_tables([factors], is_a)]
    assert [(table.aligned, table.positions) for table in tables] == [(True, [0, 2]), (False, [1, 3])]
    for got, t, side in zip(gram.factor_grams(factors, is_a), factors, is_a, strict=True):
        torch.testing.assert_close(got, t @ t.T if side else t.T @ t)

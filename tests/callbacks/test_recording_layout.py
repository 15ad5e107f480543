"""Every entry is recorded by exactly one process, which has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.callbacks.recording_layout import Held, layout_of, shared_layout
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.layout import places_in_layer
from lightning_unlearn.utilities.distributed import share_out

RUN = (1,)


def whole(name, numel):
    return Held(name, numel, 0, (numel,), RUN)


def runs(name, numel, n):
    """What `n` processes hold of a layer that is cut into runs; the last ones may hold nothing."""
    size = -(-numel // n)
    starts = [min(rank * size, numel) for rank in range(n)]
    lengths = [min(size, numel - start) for start in starts]
    return [
        Held(name, numel, start if length else 0, (length,), RUN) for start, length in zip(starts, lengths, strict=True)
    ]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from(["whole", "cut", "hybrid"])), min_size=1, max_size=6),
    st.sampled_from([2, 4, 6]),
)
def test_each_entry_is_recorded_once_by_a_process_that_holds_it(layers, n):
    columns = []
    for number, (numel, kind) in enumerate(layers):
        if kind == "whole":
            columns.append([whole(str(number), numel)] * n)
        elif kind == "cut":
            columns.append(runs(str(number), numel, n))
        else:  # the same cut in every group of two
            columns.append(runs(str(number), numel, 2) * (n // 2))
    everyone = list(zip(*columns, strict=True))
    layouts = [shared_layout(everyone, rank) for rank in range(n)]
    assert len({layout.pieces for layout in layouts}) == 1
    recorded = [[] for _ in layers]
    for rank, layout in enumerate(layouts):
        for layer, place in layout.mine.items():
            held = everyone[rank][layer]
            if place is None:
                entries = list(range(layout.numel[layer]))
            else:
                piece = layout.pieces[place]
                entries = places_in_layer(piece, torch.arange(piece.numel)).tolist()
            assert set(entries) <= set(range(held.start, held.start + held.shape[0]))
            recorded[layer] += entries
    assert [sorted(one) for one in recorded] == [list(range(numel)) for numel, _ in layers]


def test_copies_of_a_piece_are_shared_out_by_size():
    everyone = list(zip(*[runs("large", 40, 2) * 2, runs("small", 20, 2) * 2], strict=True))
    loads = [0] * 4
    for rank in range(4):
        layout = shared_layout(everyone, rank)
        loads[rank] = sum(layout.pieces[place].numel for place in layout.mine.values())
    assert sorted(loads) == [10, 10, 20, 20]


def test_without_sharding_nothing_is_exchanged_and_layers_are_shared_out():
    held = [whole("a", 10), whole("b", 3), whole("c", 4), whole("d", 3)]
    owners = share_out([10, 3, 4, 3], 2)
    for rank in range(2):
        layout = layout_of(held, rank, 2)
        assert dict(layout.mine) == {layer: None for layer, owner in enumerate(owners) if owner == rank}
        assert not layout.is_sharded
    assert dict(layout_of(held, 1, 2, one_place=True).mine) == {}


def test_pieces_that_do_not_add_up_are_refused_by_name():
    first, _ = runs("net.weight", 9, 2)
    with pytest.raises(UnsupportedStrategyError, match=r"net\.weight.*9 entries.*\[5\]"):
        shared_layout([[first], [first]], 0)

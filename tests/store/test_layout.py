"""Layers that several ranks recorded in pieces are read as if one had recorded them whole."""

import itertools

import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.layer_sums import layer_sums
from lightning_unlearn.exceptions import StoreCorruptedError
from lightning_unlearn.functional.pruning import kept_count
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.layout import add_piece, join_pieces, places_in_layer
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.types import (
    DataFingerprint,
    LayerDelta,
    LayerInfo,
    LayerPiece,
    ModelSignature,
    RecordingSettings,
)

SHAPES = {"rows": (7, 5), "columns": (4, 6), "bias": (5,), "whole": (3,)}
LAYERS = tuple(LayerInfo(name, shape, "float32") for name, shape in SHAPES.items())
RUN = (1,)
PIECES = (
    LayerPiece(0, 0, (20,), RUN),
    LayerPiece(0, 20, (15,), RUN),
    LayerPiece(1, 0, (4, 3), (6, 1)),
    LayerPiece(1, 3, (4, 3), (6, 1)),
    LayerPiece(2, 0, (3,), RUN),
    LayerPiece(2, 3, (2,), RUN),
)
STEPS = 5


def entries(piece):
    return places_in_layer(piece, torch.arange(piece.numel))


def change(step, name):
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def kept(dense, keep):
    """As a recorder keeps it: everything, or the largest entries of the layer (without positions, with)."""
    flat = dense.flatten()
    if keep == 1.0:
        return flat, None
    chosen = flat.abs().topk(kept_count(flat.numel(), keep)).indices.sort().values
    return flat, chosen


def restricted(layer, number, piece, keep):
    """What the piece's holder writes: positions are places in the piece."""
    flat, chosen = kept(layer, keep)
    inside = entries(piece)
    if chosen is None:
        return LayerDelta(number, None, flat[inside])
    local = torch.tensor([place for place, where in enumerate(inside.tolist()) if where in set(chosen.tolist())])
    return LayerDelta(number, local.to(torch.int64), flat[inside[local]] if len(local) else torch.empty(0))


def store_of(path, keep, *, cut):
    store = DeltaStore.create(
        path,
        signature=ModelSignature(LAYERS),
        settings=RecordingSettings(keep=keep, value_dtype="float32"),
        data=DataFingerprint("position", 10),
        initial={name: torch.zeros(shape) for name, shape in SHAPES.items()},
        world_size=2 if cut else 1,
    )
    first = store.add_pieces(PIECES) if cut else 0
    writers = [store.writer(rank) for rank in range(store.world_size)]
    for step in range(STEPS):
        parts = [[] for _ in writers]
        for number, info in enumerate(LAYERS):
            held = [(index, piece) for index, piece in enumerate(PIECES) if piece.layer == number]
            if cut and held:
                for rank, (index, piece) in enumerate(held):
                    parts[rank].append(restricted(change(step, info.name), first + index, piece, keep))
            else:
                flat, chosen = kept(change(step, info.name), keep)
                parts[-1].append(LayerDelta(number, chosen, flat if chosen is None else flat[chosen]))
        for rank, writer in enumerate(writers):
            writer.append(optimizer=0, sample_ids=[step], batch_size=1, seconds=0.1, deltas=parts[rank])
    for writer in writers:
        writer.close()
    return DeltaStore.open(path)


@pytest.fixture(params=[1.0, 0.3])
def pair(request, tmp_path):
    return store_of(tmp_path / "one", request.param, cut=False), store_of(tmp_path / "cut", request.param, cut=True)


def test_a_step_is_that_of_one_process(pair):
    alone, cut = pair
    for step in range(STEPS):
        ours, theirs = cut.read(step), alone.read(step)
        assert list(ours) == list(theirs)
        for name, delta in theirs.items():
            assert (ours[name].indices is None) == (delta.indices is None)
            assert delta.indices is None or torch.equal(ours[name].indices, delta.indices)
            assert torch.equal(ours[name].values, delta.values)


@pytest.mark.parametrize("keep", [None, 0.2, {"rows": 0.1, "columns": 0.5}])
@pytest.mark.parametrize("memory_bytes", [None, 8])
def test_sums_are_those_of_one_process(pair, keep, memory_bytes):
    alone, cut = pair
    amounts = {0: 1.0, 2: 0.25, 4: 1.0}
    ours, theirs = (accumulate(store, amounts, keep=keep) for store in (cut, alone))
    assert ours.keys() == theirs.keys() == SHAPES.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


SPANS = {"rows": (20, 35), "columns": (3, 24), "bias": (1, 4)}


@pytest.mark.parametrize("keep", [None, 0.2, {"rows": 0.1, "columns": 0.5}])
def test_sums_of_spans_are_those_of_the_whole(pair, keep):
    amounts = {0: 1.0, 2: 0.25, 4: 1.0}
    for store in pair:
        (whole,), (parts,) = (list(layer_sums(store, amounts, keep=keep, spans=spans)) for spans in (None, SPANS))
        assert whole.keys() == parts.keys()
        for name, total in whole.items():
            start, stop = SPANS.get(name, (0, total.numel()))
            assert parts[name].shape == (stop - start,) if name in SPANS else total.shape
            assert torch.equal(parts[name].flatten(), total.flatten()[start:stop])


def test_parts_that_hold_nothing_of_a_span_are_not_read(pair):
    _, cut = pair
    reads = []
    payload = Segment.payload
    spans = {"rows": (0, 20), "columns": (0, 0), "bias": (0, 3), "whole": (0, 0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segment, "payload", lambda self, index: reads.append(self.ref.name) or payload(self, index))
        list(layer_sums(cut, {0: 1.0, 1: 1.0}, spans=spans))
    assert len(reads) == 2
    assert set(reads) == {ref.name for ref in cut.reader.commits[0].segments}


def test_the_same_pieces_are_added_once_and_others_follow(tmp_path):
    store = store_of(tmp_path / "cut", 1.0, cut=True)
    assert store.add_pieces(PIECES) == len(LAYERS)
    assert store.add_pieces(PIECES[:2]) == len(LAYERS) + len(PIECES)
    assert store.add_pieces(PIECES) == len(LAYERS)
    assert DeltaStore.open(store.url).pieces == (*PIECES, *PIECES[:2])
    assert store.verify().ok


def test_a_damaged_layout_is_told_and_nothing_is_read_by_it(tmp_path):
    store = store_of(tmp_path / "cut", 1.0, cut=True)
    name = store.lineage.layouts[0][0]
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes().replace(b"20", b"21", 1))
    again = DeltaStore.open(store.url)
    with pytest.raises(StoreCorruptedError, match=name):
        again.read(0)
    assert name in str(again.verify())


def test_pieces_of_a_purged_and_merged_store_stay_pieces(tmp_path):
    store = store_of(tmp_path / "cut", 0.3, cut=True)
    before = [store.read(step) for step in range(STEPS)]
    store.purge([1], [1])
    store.compact()
    again = DeltaStore.open(store.url)
    for step in (0, 2, 3, 4):
        after = again.read(step)
        assert all(torch.equal(after[name].values, before[step][name].values) for name in SHAPES)


def test_an_entry_that_two_pieces_hold_is_refused():
    info = LayerInfo("bias", (4,), "float32")
    one, two = LayerPiece(0, 0, (3,), RUN), LayerPiece(0, 2, (2,), RUN)
    with pytest.raises(ValueError, match="an entry of layer 0 twice"):
        join_pieces(info, [(one, LayerDelta(1, None, torch.ones(3))), (two, LayerDelta(2, None, torch.ones(2)))])


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5)])
def test_places_and_sums_of_boxes_are_those_of_slices(shape):
    layer = torch.arange(float(torch.Size(shape).numel())).view(shape)
    halves = [(slice(0, size // 2), slice(size // 2, size)) for size in shape]
    rebuilt = torch.zeros(layer.numel())
    for corner in itertools.product(*halves):
        part = layer[corner]
        piece = LayerPiece(0, int(part.flatten()[0]), tuple(part.shape), part.stride())
        assert entries(piece).tolist() == part.flatten().tolist()
        assert piece.stop == int(part.flatten()[-1]) + 1
        add_piece(rebuilt, piece, part.flatten())
    assert torch.equal(rebuilt.view(shape), layer)

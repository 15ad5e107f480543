"""Decision regions of models whose regions are known, and what is drawn of them."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_unlearn.report import DecisionPlane, decision_plane, draw_decision_plane, plot_decision_regions
from lightning_unlearn.report.region_drawing import class_colours, region_image
from lightning_unlearn.utilities.batch_adapter import BatchAdapter

CORNERS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
NAMES = ["cat $1", "dog $2", "owl"]


class Strips(nn.Module):
    """Class 0 left of the place, class 1 right of it, class 2 above the line y = 0.5."""

    def __init__(self, place, sure=50.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor(place))
        self.sure = sure

    def forward(self, x):
        above = x[:, 1] > 0.5
        right = (x[:, 0] > self.place) & ~above
        return self.sure * torch.stack([~above & ~right, right, above], dim=1).float()


def plane(**arguments):
    models = {"original": Strips(0.25), "unlearned": Strips(1.25)}
    return decision_plane(models, *CORNERS, **{"resolution": 9, "margin": 0.0, **arguments})


def test_regions_are_where_they_are_known_to_be():
    found = plane()
    x, y = found.coordinates.unbind(-1)
    for name, place in (("original", 0.25), ("unlearned", 1.25)):
        wanted = torch.where(y > 0.5, 2, (x > place).long())
        assert torch.equal(found.classes[name], wanted)
    assert found.answers == {"original": (0, 1, 2), "unlearned": (0, 1, 2)}
    # Of nine columns those at 0.5, 0.75, 1 and 1.25 change, in the five rows up to y = 0.5.
    assert found.changed == {"original": 0.0, "unlearned": pytest.approx(4 * 5 / 81)}
    assert found.n_classes == 3
    torch.testing.assert_close(found.samples, CORNERS.double())
    assert float(found.confidences["original"].min()) > 0.999


def test_samples_are_where_the_grid_has_them():
    first, second, third = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = decision_plane({"one": nn.Sequential(nn.Flatten(), nn.Linear(18, 4))}, first, second, third, resolution=5)
    low, high = found.coordinates.reshape(-1, 2).min(0).values, found.coordinates.reshape(-1, 2).max(0).values
    inner = (high - low) / 1.2 * 0.1  # the margin is a tenth of the length without it
    torch.testing.assert_close(found.samples.max(0).values, high - inner)
    torch.testing.assert_close(found.samples.min(0).values, low + inner)
    torch.testing.assert_close(torch.pdist(found.samples)[0], (second - first).double().norm())
    torch.testing.assert_close(torch.pdist(found.samples)[2], (third - second).double().norm())


def test_batches_do_not_matter():
    assert torch.equal(plane(batch_size=7).classes["unlearned"], plane().classes["unlearned"])


class Noisy(nn.Module):
    """Counts its calls in a buffer, draws in eval mode, and has parts in different modes."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.drop(self.norm(x))) + 0 * torch.rand(1)


def test_models_and_random_numbers_are_left_as_they_were():
    model = Noisy()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    decision_plane({"noisy": model}, *CORNERS.clone().requires_grad_(), resolution=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in (model, model.norm, model.drop, model.head)] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_reads_other_answers():
    class Reads(BatchAdapter):
        def logits(self, module, inputs):
            return module(inputs)["scores"]

    class Other(nn.Module):
        def forward(self, x):
            return {"scores": Strips(0.25)(x)}

    found = decision_plane({"other": Other()}, *CORNERS, resolution=9, margin=0.0, adapter=Reads())
    assert torch.equal(found.classes["other"], plane().classes["original"])


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        decision_plane({}, *CORNERS)
    with pytest.raises(ValueError, match="logits of shape"):
        decision_plane({"three": nn.Linear(2, 3), "four": nn.Linear(2, 4)}, *CORNERS)
    broken = nn.Linear(2, 3)
    nn.init.constant_(broken.bias, torch.nan)
    with pytest.raises(ValueError, match="finite"):
        decision_plane({"broken": broken}, *CORNERS)
    with pytest.raises(ValueError, match="batch_size"):
        plane(batch_size=0)
    with pytest.raises(ValueError, match="3 names"):
        draw_decision_plane(plane(), class_names=["cat", "dog"])
    for labels in ([0, 1], [0, 1, 3], [0, -1, 2]):
        with pytest.raises(ValueError, match="labels"):
            draw_decision_plane(plane(), labels=labels)


def test_panels_say_label_answer_and_change(tmp_path):
    figure = draw_decision_plane(plane(), class_names=NAMES, labels=[1, 1, 2], title="Cost: $5 or $6")
    assert isinstance(figure, Figure)
    original, unlearned = figure.axes
    assert original.get_title() == "original\nlabelled dog $2, answers cat $1"
    assert unlearned.get_xlabel() == "25% of the area changed"
    assert "compared" in original.get_xlabel()
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [*NAMES, "forgotten sample", "other samples"]
    assert [text.get_text() for text in original.texts] == ["dog $2", "dog $2", "owl"]
    star, dots = sorted(original.collections, key=lambda marks: len(marks.get_offsets()))
    assert star.get_offsets().tolist() == [[0.0, 0.0]]
    assert dots.get_offsets().tolist() == CORNERS[1:].tolist()
    assert star.get_sizes()[0] > dots.get_sizes()[0]
    figure.savefig(tmp_path / "regions.png")  # warnings are errors here


def test_the_picture_lies_where_its_points_lie():
    figure = draw_decision_plane(plane())
    image = figure.axes[0].get_images()[0]
    assert image.get_extent() == pytest.approx([-0.125, 2.125, -0.0625, 1.0625])
    pixels = torch.tensor(image.get_array().tolist())  # rows go up, columns to the right
    colours = {key: torch.tensor(colour) for key, colour in class_colours([0, 1, 2]).items()}
    for row, column, answer in ((0, 0, 0), (0, 8, 1), (8, 0, 2)):
        torch.testing.assert_close(pixels[row, column].double(), colours[answer].double(), atol=1e-3, rtol=0)


def test_only_classes_that_occur_are_in_the_legend_and_colours_are_shared():
    figure = draw_decision_plane(decision_plane({"a": Strips(5.0), "b": Strips(1.0)}, *CORNERS, resolution=5))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:-2] == ["0", "1", "2"]
    low = decision_plane({"a": Strips(5.0)}, CORNERS[0], CORNERS[1], torch.tensor([1.0, 0.3]), resolution=5, margin=0.0)
    assert [text.get_text() for text in draw_decision_plane(low).legends[0].get_texts()][:-2] == ["0"]


def test_paler_is_less_sure():
    classes, sure = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1 / 3, 0.6, 1.0]])
    image = region_image(classes, sure, class_colours([0]), 3)
    distances = (image - torch.tensor(class_colours([0])[0]).double()).norm(dim=-1)[0].tolist()
    assert distances[0] > distances[1] > distances[2] == 0


def test_many_classes_have_colours_of_their_own():
    colours = class_colours(list(range(40)))
    assert len({tuple(round(part, 3) for part in colour) for colour in colours.values()}) == 40


def test_many_panels_and_a_flat_plane():
    models = {f"model {number}": Strips(number / 4) for number in range(4)}
    figure = plot_decision_regions(models, CORNERS[0], CORNERS[1], torch.tensor([1.0, 0.01]), resolution=4)
    assert len(figure.axes) == 4
    assert isinstance(decision_plane(models, *CORNERS, resolution=4), DecisionPlane)

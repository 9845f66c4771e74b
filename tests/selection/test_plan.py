"""Plans: written and read back, put one after another, and never made from a damaged file."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import changed_json, geometries, json_values, layer_widths, overwritten, plans
from tiny_families import DENSE, make_model, plan_keeping

from prunus.errors import PlanError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.plan import KeptGroups, Plan
from prunus.surgery import apply_plan


@pytest.fixture
def plan(geometry):
    """Ranges, single groups, an absent block and an absent layer."""
    return Plan.from_kept(
        geometry,
        [
            {"attention": [0, 2], "mlp": [0, 1, 2, 3, 7, 9, 10]},
            {"attention": [], "mlp": [19]},
            {"attention": [], "mlp": []},
            {"attention": [0, 1, 2], "mlp": range(20)},
        ],
    )


def write(tmp_path, content) -> str:
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# --- written and read back ---


@given(plan=plans())
def test_round_trip(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.fingerprint == plan.fingerprint
    assert again.to_json() == plan.to_json() == path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_as_a_reader_sees_it(plan):
    """The format is a promise: other tools read it."""
    assert plan.to_dict() == {
        "format": "prunus-plan",
        "version": 1,
        "model_type": "llama",
        "layers": [
            {"attention": {"groups": 3, "kept": "0,2"}, "mlp": {"groups": 20, "kept": "0-3,7,9-10"}},
            {"attention": {"groups": 3, "kept": ""}, "mlp": {"groups": 20, "kept": "19"}},
            {"attention": {"groups": 3, "kept": ""}, "mlp": {"groups": 20, "kept": ""}},
            {"attention": {"groups": 3, "kept": "0-2"}, "mlp": {"groups": 20, "kept": "0-19"}},
        ],
    }
    assert plan.surviving_layers == (0, 1, 3)
    assert plan.kept_widths == (LayerWidths(2, 7), LayerWidths(0, 1), LayerWidths(0, 0), LayerWidths(3, 20))


@given(first=plans(), second=plans())
def test_fingerprints_tell_plans_apart(first, second):
    assert (first.fingerprint == second.fingerprint) == (first == second)


def test_plans_are_frozen(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.layers = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.layers[0].mlp = ()


@given(geometry=geometries(), data=st.data())
def test_from_kept_sorts(geometry, data):
    expected = data.draw(plans(geometry.widths, geometry.family.model_type))
    kept = [{axis: data.draw(st.permutations(layer[axis])) for axis in AXES} for layer in expected.layers]
    assert Plan.from_kept(geometry, kept) == expected
    expected.check_fits(geometry)
    assert geometry.parameters_left(expected.kept_widths) <= geometry.total_parameters


@given(geometry=geometries())
def test_keeping_everything(geometry):
    plan = Plan.keep_all(geometry)
    assert plan.kept_widths == plan.widths == geometry.widths
    assert geometry.parameters_left(plan.kept_widths) == geometry.total_parameters


# --- plans that cannot be ---


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (KeptGroups((0, 3), ()), r"layer 0, attention: kept groups 0\.\.3 are outside the 3 groups"),
        (KeptGroups((-1, 0), ()), r"layer 0, attention: kept groups -1\.\.0 are outside"),
        (KeptGroups((1, 0), ()), "layer 0, attention: kept groups must ascend"),
        (KeptGroups((), (4, 4)), "layer 0, mlp: kept groups must ascend"),
        (KeptGroups((), ()), "removes every layer"),
    ],
)
def test_kept_groups_that_cannot_be(kept, message):
    with pytest.raises(PlanError, match=message):
        Plan("llama", (LayerWidths(3, 20),), (kept,))


def test_as_many_layers_as_the_model():
    with pytest.raises(PlanError, match="2 layers for a model of 1"):
        Plan("llama", (LayerWidths(3, 20),), (KeptGroups((0,), ()),) * 2)


def test_models_of_another_shape(plan, tiny_model):
    def shape(*case, **fields):
        return Geometry.of(tiny_model(*case, **{"num_hidden_layers": 4, **fields}))

    plan.check_fits(shape("llama", "gqa"))
    with pytest.raises(PlanError, match="for family 'llama', the model is 'mistral'"):
        plan.check_fits(shape("mistral", "gqa-tied"))
    with pytest.raises(PlanError, match="for 4 decoder layers, the model has 3"):
        plan.check_fits(shape("llama", "gqa", num_hidden_layers=3))
    with pytest.raises(PlanError, match=r"layer 0: the plan is for .*20.*, the model has .*24"):
        plan.check_fits(shape("llama", "gqa", intermediate_size=24))


# --- one after another ---


@given(data=st.data())
def test_composing_is_associative(data):
    first = data.draw(plans())
    second = data.draw(plans(tuple(first.layers[i].widths for i in first.surviving_layers), first.model_type))
    third = data.draw(plans(tuple(second.layers[i].widths for i in second.surviving_layers), first.model_type))
    assert first.compose(second).compose(third) == first.compose(second.compose(third))
    nothing = Plan(
        first.model_type,
        tuple(first.layers[i].widths for i in first.surviving_layers),
        tuple(KeptGroups(*(tuple(range(first.layers[i].widths[a])) for a in AXES)) for i in first.surviving_layers),
    )
    assert first.compose(nothing) == first


@pytest.mark.parametrize("model_type", DENSE)
def test_a_composed_plan_equals_two_cuts(model_type):
    """On real weights, with blocks and layers that go in the first cut, in the second, or bit by bit."""
    model = make_model(model_type, num_hidden_layers=4)
    first = plan_keeping(
        Geometry.of(model),
        [
            {"attention": [0, 2], "mlp": range(5, 15)},
            {"attention": [], "mlp": []},
            {"attention": [], "mlp": [1, 4, 9]},
            {"attention": [1, 2], "mlp": range(20)},
        ],
    )
    once = apply_plan(model, first)
    second = plan_keeping(
        Geometry.of(once),
        [
            {"attention": [1], "mlp": [0, 9]},
            {"attention": [], "mlp": []},
            {"attention": [0, 1], "mlp": []},
        ],
    )
    twice = apply_plan(once, second)
    both = apply_plan(model, first.compose(second))
    layers = [((2,), (5, 14)), ((), ()), ((), ()), ((1, 2), ())]
    assert first.compose(second) == plan_keeping(
        Geometry.of(model), [dict(zip(AXES, kept, strict=True)) for kept in layers]
    )
    assert type(both) is type(twice)
    assert both.config.to_dict() == twice.config.to_dict()
    assert both.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in both.state_dict().items())


def test_composing_when_the_class_changes():
    """A Llama whose heads no longer divide its hidden size goes on as a Mistral; a second cut is one all the same."""
    model = make_model("llama", "mha-tied", hidden_size=32)
    first = Plan.from_kept(Geometry.of(model), [{"attention": [0, 1, 3], "mlp": range(20)}] * 2)
    once = apply_plan(model, first)
    assert once.config.model_type == "mistral"
    second = Plan.from_kept(Geometry.of(once), [{"attention": [0, 2], "mlp": range(10)}] * 2)
    both = apply_plan(model, first.compose(second)).state_dict()
    assert all(torch.equal(tensor, both[name]) for name, tensor in apply_plan(once, second).state_dict().items())


@given(data=st.data())
def test_plans_that_do_not_follow_each_other(data):
    first, second = data.draw(plans()), data.draw(plans())
    if second.widths != tuple(first.layers[i].widths for i in first.surviving_layers):
        with pytest.raises(PlanError, match="not made for the model that the first one leaves"):
            first.compose(second)


# --- damaged files ---


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(PlanError, match=r"the plan .*nothing\.json cannot be read|is a folder; name the plan file"):
            Plan.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "prunus-plan", "version": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut off", "binary", "deep", "a number of 5000 digits"],
)
def test_files_that_are_not_json(tmp_path, content):
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(write(tmp_path, content))


DAMAGE = {
    "another format": ({"format": "gguf"}, "not a prunus plan"),
    "no format": ({"format": None}, "not a prunus plan"),
    "a newer version": ({"version": 2}, "plan version 2 is not 1"),
    "no layers": ({"layers": None}, r"plan\.json: layers is null; it must be an array"),
    "layers in words": ({"layers": "all"}, 'layers is "all"; it must be an array'),
    "no layer": ({"layers": []}, "layers is an array of 0; List should have at least 1 item"),
    "no family": ({"model_type": None}, "model_type"),
}


@pytest.mark.parametrize(("changes", "message"), DAMAGE.values(), ids=DAMAGE)
def test_malformed_plans(plan, tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        Plan.load(write(tmp_path, {**plan.to_dict(), **changes}))


@pytest.mark.parametrize("value", [[], "plan", 3, None, True], ids=repr)
def test_json_that_is_no_plan(tmp_path, value):
    with pytest.raises(PlanError, match=r"plan\.json does not hold a JSON object"):
        Plan.load(write(tmp_path, value))


@pytest.mark.parametrize(
    "kept",
    [
        "0-",
        "-1",
        "1,,2",
        "a",
        "0 - 3",
        "0-3,",
        "3-1",
        "0-3,2",
        "4,1",
        "1,1",
        "20",
        "0-20",
        "0-9999999999",
        "٣",
        None,
        3,
        [0],
    ],
    ids=repr,
)
def test_malformed_ranges(plan, tmp_path, kept):
    values = plan.to_dict()
    values["layers"][1]["mlp"]["kept"] = kept
    with pytest.raises(PlanError, match=r"layer 1, mlp|layers\.1\.mlp\.kept is .*; it must be text"):
        Plan.load(write(tmp_path, values))


@pytest.mark.parametrize("groups", [-1, 2.5, "20", None, True, float("inf"), float("nan"), 10**12], ids=repr)
def test_malformed_numbers_of_groups(plan, tmp_path, groups):
    values = plan.to_dict()
    values["layers"][1]["mlp"] = {"groups": groups, "kept": "0"}
    with pytest.raises(PlanError, match=r"plan|layer 1, mlp"):
        Plan.load(write(tmp_path, values))


def test_a_damaged_file_does_not_fill_the_memory(plan, tmp_path):
    """A few bytes can name more groups than any memory holds."""
    for kept in ("0-999999999", ",".join(["0-9999999"] * 10_000)):
        values = plan.to_dict()
        values["layers"][1]["mlp"] = {"groups": 10**10, "kept": kept}
        with pytest.raises(
            PlanError, match=r"layers\.1\.mlp\.groups is 10000000000; it must be less than or equal to 131072"
        ):
            Plan.load(write(tmp_path, values))


def is_refused_or_valid(read) -> None:
    """Reading raises nothing but `PlanError`, or gives a plan that can be used."""
    try:
        plan = read()
    except PlanError as error:
        assert str(error)  # noqa: PT017 (either way will do)
        return
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert plan.surviving_layers
    for before, kept in zip(plan.widths, plan.layers, strict=True):
        for axis in AXES:
            assert set(kept[axis]) <= set(range(before[axis]))


@given(data=st.data())
def test_any_part_replaced_by_anything(data):
    """One node of the JSON, wherever it is, becomes another value, disappears or is renamed."""
    values = data.draw(changed_json(data.draw(plans()).to_dict()))
    is_refused_or_valid(lambda: Plan.from_dict(json.loads(json.dumps(values))))


@given(widths=layer_widths(), layers=st.lists(json_values, max_size=3), rest=json_values)
def test_anything_for_layers(widths, layers, rest):
    head = {"format": "prunus-plan", "version": 1, "model_type": rest}
    is_refused_or_valid(lambda: Plan.from_dict({**head, "layers": layers}))
    is_refused_or_valid(lambda: Plan.from_dict({**head, "layers": rest}))
    is_refused_or_valid(lambda: Plan.from_dict(rest))


@given(plan=plans(), data=st.data())
def test_bytes_overwritten(plan, data, tmp_path_factory):
    content = data.draw(overwritten(plan.to_json().encode()))
    path = write(tmp_path_factory.mktemp("damaged"), content)
    is_refused_or_valid(lambda: Plan.load(path))


def small_file(tmp_path, layers: int, groups: int) -> Path:
    """A plan of a few bytes per layer that keeps everything."""
    axes = {"attention": {"groups": 1, "kept": "0"}, "mlp": {"groups": groups, "kept": f"0-{groups - 1}"}}
    path = tmp_path / "plan.json"
    values = {"format": "prunus-plan", "version": 1, "model_type": "llama", "layers": [axes] * layers}
    path.write_text(json.dumps(values, separators=(",", ":")))
    return path


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [
        (1, 9_999_999, r"layers\.0\.mlp\.groups is 9999999; it must be less than or equal to 131072"),
        (70, 131_072, "its layers have 9,175,110 groups, and no plan has more than 8,388,608"),
    ],
)
def test_a_small_file_does_not_unfold_to_ten_million_groups(tmp_path, layers, groups, message):
    path = small_file(tmp_path, layers, groups)
    assert path.stat().st_size < 8192
    assert peak_of(lambda: Plan.load(path), message) < 2**20


def test_a_plan_for_another_model_is_refused_before_it_unfolds(tmp_path, geometry):
    path = small_file(tmp_path, 50, 131_072)
    assert peak_of(lambda: Plan.load(path, geometry), "50 decoder layers, the model has 4") < 2**20
    path = small_file(tmp_path, 4, 131_072)
    assert peak_of(lambda: Plan.load(path, geometry), "layer 0: the plan is for") < 2**20


def peak_of(read, message: str) -> int:
    """Bytes that reading a plan takes at most until it is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(PlanError, match=message):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_largest_model_has_a_plan(tmp_path):
    """Llama 3.1 405B: 126 layers of 8 groups and 53,248 channels."""
    values = {"format": "prunus-plan", "version": 1, "model_type": "llama"}
    axes = {"attention": {"groups": 8, "kept": "0-7"}, "mlp": {"groups": 53_248, "kept": "0-53247"}}
    (tmp_path / "plan.json").write_text(json.dumps({**values, "layers": [axes] * 126}))
    assert Plan.load(tmp_path / "plan.json").kept_widths == (LayerWidths(8, 53_248),) * 126

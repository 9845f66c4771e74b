"""A model whose decoder layers stay on disk does all that the same model in memory does."""

from __future__ import annotations

import weakref
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import CASES, ONE_UNLIKE, case_id, logits, make_model, padded_batches, plan_keeping, random_tokens
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prunus.calibration import Batch
from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.checkpoint.open import read_layers_
from prunus.errors import CheckpointError, NonFiniteError, OptionError
from prunus.files.tensor_file import TensorFile
from prunus.importance import METHODS, get_method, score_groups
from prunus.importance.registry import MethodOptions, statistics_for
from prunus.model.compact import Compact, kept
from prunus.model.digest import digest_model
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.saved_dtype import save_in_
from prunus.repair.block_repair import repair_
from prunus.selection.plan import Plan
from prunus.statistics import ActivationStatistics, GateGradients, WeightGradients
from prunus.surgery import apply_plan
from prunus.sweep import sweep
from prunus.sweep.sequence_loss import perplexity_of_windows

DENSE_METHODS = [method for method in METHODS.values() if set(AXES) <= set(method.axes)]


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3").save_pretrained(folder)
    return folder


def cut(geometry: Geometry) -> Plan:
    """A ragged cut that also takes a block and a layer away."""
    kept = [{axis: range(i % 2, widths[axis], 2) for axis in AXES} for i, widths in enumerate(geometry.widths)]
    kept[0] = {"attention": [], "mlp": range(5)}
    kept[1] = {"attention": [], "mlp": []}
    return plan_keeping(geometry, kept)


def assert_nothing_held(model):
    assert all(p.is_meta for layer in layers_of(model).modules for p in layer.parameters())


def test_what_goes_wrong_in_the_thread_that_reads_ahead_is_said(tmp_path, monkeypatch):
    model, _ = open_model(save(make_model(*CASES[0], num_hidden_layers=3), tmp_path / "model"))

    def fail(*_):
        raise KeyError("a name that is not there")

    monkeypatch.setattr(TensorFile, "will_need", fail)
    with pytest.raises(KeyError, match="a name that is not there"):
        logits(model, random_tokens())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_statistics_are_those_of_the_model_in_memory(case, tmp_path):
    folder = save(make_model(*case, num_hidden_layers=3), tmp_path / "model")
    resident, opened = load_model(folder)[0], open_model(folder)[0]
    assert Geometry.of(opened) == Geometry.of(resident)
    for name, buffer in resident.named_buffers():
        assert torch.equal(buffer, opened.get_buffer(name)), name
    for kinds in (
        (lambda: WeightGradients(squares=True), GateGradients, ActivationStatistics),
        (ActivationStatistics,),
    ):
        expected = sweep(resident, padded_batches(), [kind() for kind in kinds], engine="resident", progress=False)
        found = sweep(opened, padded_batches(), [kind() for kind in kinds], engine="streamed", progress=False)
        assert_nothing_held(opened)
        for one, other in zip(expected.layers, found.layers, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("case", "stored"),
    # Both for the first; after that in turn, as a conversion looks at tensors and not at families.
    [(ONE_UNLIKE[0], torch.bfloat16), *zip(ONE_UNLIKE, cycle([torch.float32, torch.bfloat16]), strict=False)],
    ids=lambda value: case_id(value) if isinstance(value, tuple) else str(value),
)
def test_scored_cut_repaired_measured_and_saved_as_in_memory(case, stored, tmp_path):
    """Computed in float32, and saved in the dtype of the file."""
    model = make_model(*case, num_hidden_layers=4).to(stored)
    folder = save(model, tmp_path / "model")
    data = [Batch(ids, None) for ids in random_tokens(batch=8, seq_len=16).split(4)]
    plan = cut(Geometry.of(model))
    found = {}
    for name, load in {"resident": load_model, "opened": open_model}.items():
        dense, tokenizer = load(folder, dtype="float32")
        save_in_(dense, stored)
        found[name, "digest"] = digest_model(dense)
        wanted = statistics_for(DENSE_METHODS, MethodOptions())
        statistics = sweep(dense, data, wanted, engine="streamed", progress=False)
        for method in DENSE_METHODS:
            found[name, method.name] = score_groups(dense, get_method(method.name), statistics)
        smaller = apply_plan(dense, plan)
        found[name, "repairs"] = repair_(smaller, dense, plan, data, progress=False)
        found[name, "logits"] = logits(smaller, random_tokens())
        found[name, "written"] = smaller.generate(random_tokens(), max_new_tokens=4, do_sample=False)
        found[name, "nll"] = perplexity_of_windows(smaller, random_tokens(), progress=False).nll
        # Limits so small that layers are parted over several files.
        for size in ("50GB", 9000):
            save_checkpoint(smaller, tokenizer, tmp_path / f"{name}-{size}", card="", extras={}, max_shard_size=size)
    for method in (each.name for each in DENSE_METHODS):
        for one, other in zip(found["resident", method], found["opened", method], strict=True):
            assert all(torch.equal(one[axis], other[axis]) for axis in AXES), method
    assert found["resident", "repairs"] == found["opened", "repairs"]
    assert found["resident", "digest"] == found["opened", "digest"]
    assert torch.equal(found["resident", "logits"], found["opened", "logits"])
    assert torch.equal(found["resident", "written"], found["opened", "written"])
    assert found["resident", "nll"] == found["opened", "nll"]
    for size in ("50GB", 9000):
        one, other = tmp_path / f"resident-{size}", tmp_path / f"opened-{size}"
        assert {p.name for p in one.glob("*.py")} == {p.name for p in other.glob("*.py")}
        assert (one / "config.json").read_text() == (other / "config.json").read_text()
        assert (one / "generation_config.json").read_text() == (other / "generation_config.json").read_text()
        first, second = ({k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert {tensor.dtype for tensor in second.values()} == {stored}
        reloaded = load_model(other, dtype="float32")[0]
        torch.testing.assert_close(logits(reloaded, random_tokens()), found["resident", "logits"])


def test_an_opened_model_converts_to_the_dtype_that_is_asked_for(tmp_path):
    folder = save(
        make_model("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}), tmp_path / "m"
    )
    opened, resident = (make(folder, dtype="bfloat16")[0] for make in (open_model, load_model))
    assert opened.dtype == torch.bfloat16
    assert torch.equal(logits(opened, random_tokens()), logits(resident, random_tokens()))
    assert_nothing_held(opened)


@pytest.mark.parametrize("case", [("llama", "gqa"), ("llama", "mha-tied")], ids=case_id)
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32, torch.float16])
def test_embeddings_and_head_are_there_once_as_in_the_file(case, saved, tmp_path):
    """Half precision that is computed with in float32: shared by the model and what is cut out of it."""
    model = make_model(*case, num_hidden_layers=4).to(torch.bfloat16)
    folder = save(model, tmp_path / "m")
    dense, _ = open_model(folder, dtype="float32")
    save_in_(dense, saved)
    smaller = apply_plan(dense, cut(Geometry.of(dense)))
    assert (smaller.dtype, smaller.device) == (dense.dtype, dense.device) == (torch.float32, torch.device("cpu"))
    for module in ("get_input_embeddings", "get_output_embeddings"):
        whole, weight = (getattr(each, module)().weight for each in (dense, smaller))
        assert kept(whole).dtype == torch.bfloat16
        assert torch.equal(kept(whole), getattr(model, module)().weight)
        assert torch.equal(weight[:], whole[:].to(saved).float())
        assert (kept(weight).data_ptr() == kept(whole).data_ptr()) == (saved != torch.float16)
        assert kept(weight).dtype == (torch.bfloat16 if saved == torch.float32 else saved)
    tied = case[1] == "mha-tied"
    for each in (dense, smaller):
        assert (each.get_input_embeddings().weight is each.get_output_embeddings().weight) == tied
    in_memory = read_layers_(open_model(folder, dtype="float32")[0])
    assert not any(isinstance(parameter, Compact) for parameter in in_memory.parameters())
    assert torch.equal(logits(in_memory, random_tokens()), logits(dense, random_tokens()))
    loaded = load_model(folder, dtype="float32")[0]
    assert torch.equal(logits(in_memory, random_tokens()), logits(loaded, random_tokens()))


def test_a_wide_file_is_cut_to_a_narrow_one(tmp_path):
    """Embeddings and head of the cut model are in the dtype that it is saved in."""
    dense, _ = open_model(save(make_model("llama"), tmp_path / "m"))
    save_in_(dense, torch.float16)
    smaller = apply_plan(dense, Plan.keep_all(Geometry.of(dense)))
    assert kept(smaller.lm_head.weight).dtype == torch.float16
    assert torch.equal(smaller.lm_head.weight[:], dense.lm_head.weight.half().float())
    dense.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match="too large for float16"):
        apply_plan(dense, Plan.keep_all(Geometry.of(dense)))


def test_one_layer_is_read_and_of_it_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Cut and in memory: what was read in half precision is gone when the next tensor is."""
    model = make_model("llama", num_hidden_layers=3)
    dense, _ = open_model(save(model.to(torch.bfloat16), tmp_path / "m"), dtype="float32")
    kept_channels = [{"attention": range(2), "mlp": range(0, 20, 2)}] * 3
    smaller = apply_plan(dense, plan_keeping(Geometry.of(dense), kept_channels))
    read, alive, announced, read_into = [], [], [], TensorFile.read_into

    def noting(self, name, out, entry=None):
        assert all(earlier() is None for earlier in alive)
        read_into(self, name, out, entry)
        read.append(name)
        alive.append(weakref.ref(out))

    monkeypatch.setattr(TensorFile, "read_into", noting)
    monkeypatch.setattr(TensorFile, "will_need", lambda self, name, entries=None: announced.append((name, entries)))
    of_layer = {number: [n for n in model.state_dict() if f"layers.{number}." in n] for number in range(3)}
    for opened in (dense, smaller):
        with layers_of(opened).hold(0, then=1) as layer:
            assert read == of_layer[0]
            layers_of(opened)._reader.submit(int).result()  # the one thread is through with what it had to do
            assert announced == [(name, None) for name in of_layer[1]]
            assert layer.mlp.down_proj.weight.dtype == torch.float32
        with layers_of(opened).hold(1, then=3):
            layers_of(opened)._reader.submit(int).result()
        assert read == of_layer[0] + of_layer[1]
        assert len(announced) == len(of_layer[1]), "there is no layer 3"
        read.clear(), alive.clear(), announced.clear()


def test_layers_are_let_go_after_an_exception(tmp_path):
    opened, _ = open_model(save(make_model("qwen3", num_hidden_layers=3), tmp_path / "model"))

    class Failing(WeightGradients):
        def finish_layer(self, *args):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(opened, padded_batches(), [Failing()], engine="streamed", progress=False)
    assert_nothing_held(opened)


def test_the_resident_engine_is_refused(tmp_path):
    opened, _ = open_model(save(make_model("llama"), tmp_path / "model"))
    with pytest.raises(OptionError, match="whole model in memory"):
        sweep(opened, padded_batches(), [GateGradients()], engine="resident")


def test_a_weight_that_is_not_finite_is_named_when_it_is_read(tmp_path):
    model = make_model("llama", num_hidden_layers=3)
    model.model.layers[2].mlp.up_proj.weight.data[1, 2] = float("nan")
    opened, _ = open_model(save(model, tmp_path / "model"))
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mlp\.up_proj\.weight \(layer 2\)"):
        sweep(opened, padded_batches(), [ActivationStatistics()], engine="streamed", progress=False)


def test_tensors_under_other_names_are_refused(tmp_path):
    folder = save(make_model("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"lacks 20 tensors.*'model\.embed_tokens\.weight'"):
        open_model(folder)

"""A model type is no proof of what a folder holds: classifiers, encoders and own code are refused by every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_families import ONE_EACH, case_id, make_model
from tiny_folder import TEXT, byte_tokenizer, fails, save_tiny_folder
from transformers import LlamaForSequenceClassification

from prunus.checkpoint import check_folder, load_model, open_model, read_config
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("kind") / "model", "llama")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A folder whose small files may be changed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in pristine.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).hardlink_to(file)
        else:
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_folder(folder)
    with pytest.raises(UnsupportedModelError):
        read_config(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForSequenceClassification", "a classifier of sequences"),
        ("LlamaForTokenClassification", "a classifier of tokens"),
        ("LlamaForQuestionAnswering", "marks answers"),
        ("LlamaModel", "without an output head"),
        ("LlamaBidirectionalModel", "without an output head"),
        ("LlamaForRewardModel", "a reward model"),
        ("LlavaForConditionalGeneration", "multimodal"),
        ("LlavaLlamaForCausalLM", "LlavaLlamaForCausalLM"),
        ("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle3"),
        ("Gemma2ForCausalLM", "Gemma2ForCausalLM"),
        ("PrunusLlamaForSequenceClassification", "a classifier of sequences"),
    ],
)
def test_other_architectures(folder, name, kind):
    edit(folder / "config.json", architectures=[name])
    message = refusal(folder)
    assert name in message
    assert kind in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"]])
def test_language_models(folder, architectures):
    edit(folder / "config.json", architectures=architectures)
    check_folder(folder)


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_the_class_of_every_family(case, tmp_path):
    make_model(*case).save_pretrained(tmp_path)
    read_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_bidirectional_attention": True},
        {"use_bidirectional_attention": "all"},
        {"bidirectional": True},
        {"is_causal": False},
        {"is_causal": 0},
        {"causal": False},
        {"use_causal_mask": False},
        {"attention_type": "bidirectional"},
        {"attn_mask": "bidirectional"},
        {"is_encoder_decoder": True},
    ],
    ids=str,
)
def test_attention_in_both_directions(folder, fields):
    edit(folder / "config.json", **fields)
    assert f"{next(iter(fields))} = {next(iter(fields.values()))!r}" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_bidirectional_attention": False},
        {"use_bidirectional_attention": None},
        {"is_causal": True},
        {"causal": None},
    ],
    ids=str,
)
def test_attention_to_the_past(folder, fields):
    edit(folder / "config.json", **fields)
    check_folder(folder)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModelForCausalLM": "modeling_mine.MyLlamaForCausalLM"},
        {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
        {"AutoConfig": "configuration_mine.MyConfig"},
        {"AutoModel": "someone/else--modeling_mine.MyModel"},
        {
            "AutoModelForCausalLM": "modeling_prunus.PrunusLlamaForCausalLM"
        },  # in a stock folder nothing of the kind is due
        {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    ],
    ids=str,
)
def test_own_code(folder, auto_map):
    edit(folder / "config.json", auto_map=auto_map)
    message = refusal(folder)
    assert next(iter(auto_map.values())) in message
    assert "trust_remote_code" not in message


@pytest.mark.parametrize(
    "reference", [["tokenization_mine.MyTokenizer", None], [None, "a/b--tokenization_x.T"]], ids=str
)
def test_own_code_of_a_tokenizer(folder, reference):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": reference})
    with pytest.raises(UnsupportedModelError, match="brings code of its own: AutoTokenizer") as caught:
        load_model(folder)
    assert "trust_remote_code" not in str(caught.value)


def test_code_that_transformers_took_over(tmp_path):
    """Phi-3's published folders still name the code that they came with."""
    save_tiny_folder(tmp_path, "phi3")
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    edit(tmp_path / "config.json", auto_map=code)
    load_model(tmp_path)
    edit(tmp_path / "config.json", auto_map={**code, "AutoModelForCausalLM": "modeling_phi3.MyForCausalLM"})
    assert "modeling_phi3.MyForCausalLM" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"])
def test_sentence_transformers(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert "sentence-transformers" in refusal(folder)


@pytest.mark.parametrize("fields", [{"architectures": "LlamaForCausalLM"}, {"auto_map": ["x"]}, {"auto_map": "x"}])
def test_fields_of_another_type(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_folder(folder)


SETS = ["--set", "recovery.kl_weight=0", "--set", "recovery.ce_weight=1"]
COMMANDS = {
    "prune": ["prune", "MODEL", "--out", "OUT", "--ratio", "0.1", "--set", "run.engine=resident"],
    "prune, streamed": ["prune", "MODEL", "--out", "OUT", "--ratio", "0.1", "--set", "run.engine=streamed"],
    "score": ["score", "MODEL", "--out", "OUT"],
    "compare": ["compare", "MODEL", "--out", "OUT", "--methods", "taylor", "--ratios", "0.1"],
    "apply": ["apply", "MODEL", "PLAN", "--out", "OUT"],
    "eval": ["eval", "MODEL"],
    "inspect": ["inspect", "MODEL"],
    "bench": ["bench", "MODEL"],
    "profile": ["profile", "MODEL", "--out", "OUT"],
    "export, dense": ["export", "MODEL", "--out", "OUT", "--to", "dense"],
    "export, gguf": ["export", "MODEL", "--out", "OUT", "--to", "gguf"],
    "recover": ["recover", "MODEL", "--out", "OUT", "--text", "TEXT", *SETS],
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A real one: transformers would leave out its head, and make up one that predicts tokens."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    config = make_model("llama", vocab_size=260).config
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_a_classifier(words, classifier, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    Plan.keep_all(Geometry.of(make_model("llama", vocab_size=260))).save(tmp_path / "plan.json")
    places = {
        "PLAN": tmp_path / "plan.json",
        "MODEL": classifier,
        "OUT": tmp_path / "out",
        "TEXT": tmp_path / "text.txt",
    }
    message = fails(capsys, *(places.get(word, word) for word in words))
    assert "a LlamaForSequenceClassification, a classifier of sequences" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "kernels-community/flash-attn2", {"": "flash_attention_3"}], ids=str
)
def test_an_attention_that_is_not_here(folder, name, value):
    """What the config asks for fits the machine that it was written on."""
    edit(folder / "config.json", **{name: value})
    for load in (load_model, open_model):
        model, _ = load(folder)
        assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_is_here(folder):
    edit(folder / "config.json", attn_implementation="eager")
    assert load_model(folder)[0].config._attn_implementation == "eager"

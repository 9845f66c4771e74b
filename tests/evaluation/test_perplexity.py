import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prunus.errors import NonFiniteError, OptionError
from prunus.evaluation.perplexity import perplexity, read_text
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.loss import IGNORE_INDEX, chunked_cross_entropy, head_function, next_token_labels
from prunus.sweep.sequence_loss import perplexity_of_windows

VOCABULARY = 257
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 0,
    # large, so that a random model is far from uniform and a mistake in the loss shows
    "initializer_range": 0.4,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def tokenizer():
    """One token per byte; puts a special token in front if it is let."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<begin>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", model_max_length=16)


TEXT = "The quick brown fox jumps over the lazy dog.\n\nIt was 1984, or 2024; nobody knew. " * 3


def slow_losses(model, tokenizer, text, seq_len, begin=False):
    """Every token's loss, one position of one window at a time, in float64."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses, length = [], seq_len - begin
    for start in range(0, len(ids) - length + 1, length):
        window = [256] * begin + ids[start : start + length]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for position in range(seq_len - 1):
            losses.append(-logits[position].log_softmax(dim=0)[window[position + 1]].item())
    return losses


@pytest.mark.parametrize("seq_len", [2, 7, 32, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("begin", [False, True])
def test_against_the_slow_way(model, tokenizer, seq_len, batch_size, begin):
    expected = slow_losses(model, tokenizer, TEXT, seq_len, begin)
    result = perplexity(model, tokenizer, TEXT, seq_len=seq_len, batch_size=batch_size, begin_token=begin)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert result.tokens == len(TEXT)
    assert result.tokens_scored == len(expected) == result.windows * (seq_len - 1)
    assert result.windows == len(TEXT) // (seq_len - begin)
    assert result.seq_len == seq_len


def test_the_result_says_how_it_was_measured(model, tokenizer):
    result = perplexity(model, tokenizer, TEXT, seq_len=32, begin_token=False)
    for part in ("tokenised once", "not re-joined", "no special tokens", "windows of 32", "float32 loss"):
        assert part in result.protocol
    assert f"last window of {len(TEXT) % 32} tokens dropped" in result.protocol
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    first = perplexity(model, tokenizer, TEXT, seq_len=32, max_windows=2, begin_token=False)
    assert "only the first 2 of 7 windows" in first.protocol
    assert first.windows == 2
    assert first.nll == pytest.approx(sum(slow_losses(model, tokenizer, TEXT, 32)[:62]) / 62, rel=1e-6)
    begun = perplexity(model, tokenizer, TEXT, seq_len=32).protocol
    assert "each window begun with the token that begins a text" in begun
    assert "no special tokens" not in begun


def test_a_tokenizer_that_puts_nothing_before_a_text_is_left_at_that(model, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <begin>", special_tokens=[("<begin>", 256)]
    )
    found, plain = (perplexity(model, tokenizer, TEXT, seq_len=32, begin_token=begin) for begin in (True, False))
    assert found == plain


def test_ready_windows_are_scored_alike(model, tokenizer):
    whole = perplexity(model, tokenizer, TEXT[: 32 * 7], seq_len=32, begin_token=False)
    windows = torch.tensor(tokenizer(TEXT[: 32 * 7], add_special_tokens=False)["input_ids"]).view(7, 32)
    ready = perplexity_of_windows(model, windows, batch_size=2)
    assert ready.nll == pytest.approx(whole.nll, rel=1e-6)
    assert (ready.windows, ready.tokens_scored, ready.seq_len) == (7, 7 * 31, 32)
    assert "packed token sequences" in ready.protocol


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_neither_read_nor_predicted(model, tokenizer, side):
    windows = torch.tensor(tokenizer(TEXT[:96], add_special_tokens=False)["input_ids"]).view(3, 32)
    pieces = [window[:length] for window, length in zip(windows, (32, 9, 20), strict=True)]
    padded, mask = windows.flip(0).clone(), torch.zeros_like(windows)
    for row, piece in enumerate(pieces):
        here = slice(len(piece)) if side == "right" else slice(32 - len(piece), None)
        padded[row, here], mask[row, here] = piece, 1
    found = perplexity_of_windows(model, padded, mask, batch_size=2)
    alone = [perplexity_of_windows(model, piece[None]) for piece in pieces]
    assert found.nll == pytest.approx(sum(one.nll * one.tokens_scored for one in alone) / (31 + 8 + 19), rel=1e-5)
    assert (found.tokens, found.tokens_scored) == (32 + 9 + 20, 31 + 8 + 19)


def test_a_short_text_is_one_short_window(model, tokenizer):
    result = perplexity(model, tokenizer, "Hello", seq_len=64)
    assert (result.windows, result.seq_len, result.tokens_scored) == (1, 6, 5)
    result = perplexity(model, tokenizer, "Hello", seq_len=64, begin_token=False)
    assert (result.windows, result.seq_len, result.tokens_scored) == (1, 5, 4)
    expected = slow_losses(model, tokenizer, "Hello", 5)
    assert result.nll == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_low_precision_models_keep_a_float32_loss(model, tokenizer):
    result = perplexity(model.bfloat16(), tokenizer, TEXT, seq_len=64)
    expected = slow_losses(model, tokenizer, TEXT, 64, begin=True)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert "bfloat16 model" in result.protocol


def test_every_mode_is_put_back(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    perplexity(model, tokenizer, "Hello", seq_len=4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    during = []

    def measure():
        with evaluation_mode(model):
            during.extend(module.training for module in model.modules())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        measure()
    assert not any(during)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "`seq_len` is 1"),
        ({"seq_len": 65}, r"`seq_len` is 65.*only 64 positions"),
        ({"seq_len": 8, "batch_size": 0}, "`batch_size` is 0"),
        ({"seq_len": 8, "max_windows": 0}, "`max_windows` is 0"),
    ],
)
def test_options_out_of_range(model, tokenizer, options, message):
    with pytest.raises(OptionError, match=message):
        perplexity(model, tokenizer, TEXT, **options)


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_without_anything_to_predict(model, tokenizer, text):
    with pytest.raises(OptionError, match=rf"has {len(text)} token\(s\)"):
        perplexity(model, tokenizer, text, seq_len=8)


def test_a_tokenizer_of_another_model(tokenizer):
    small = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}))
    with pytest.raises(OptionError, match="embeds only 50"):
        perplexity(small, tokenizer, TEXT, seq_len=8)


def test_a_loss_that_is_not_finite_names_the_window(model, tokenizer):
    text = "a" * 20 + "b" * 4
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("b", add_special_tokens=False)["input_ids"]] = math.nan
    with pytest.raises(NonFiniteError, match=r"window 2 \(tokens 16 to 23\)"):
        perplexity(model, tokenizer, text, seq_len=8, batch_size=2, begin_token=False)
    with pytest.raises(NonFiniteError, match=r"window 2 \(tokens 16 to 23\)"):
        perplexity(model, tokenizer, text, seq_len=9, batch_size=2)


# --- reading text --------------------------------------------------------------------------------------------------


def test_line_ends_are_kept(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\ntwo\n\nthrée\r".encode())
    assert read_text(path) == "one\r\ntwo\n\nthrée\r"


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match="cannot read"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(OptionError, match="cannot read"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(OptionError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"d\xe9j\xe0")
    with pytest.raises(OptionError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")


# --- the loss in chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_chunks_do_not_change_the_loss(model, chunk):
    ids = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = model(ids, labels=ids).loss
    hidden, labels = model.model(ids).last_hidden_state, next_token_labels(ids)
    sums = chunked_cross_entropy(hidden, head_function(model), labels, chunk)
    assert sums.shape == (3,)
    assert torch.allclose(sums.sum() / (labels != IGNORE_INDEX).sum(), expected, rtol=1e-6)
    assert not sums.requires_grad


def test_sums_are_per_sequence_and_padding_never_counts(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 10), generator=generator)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]])
    labels = next_token_labels(ids, mask)
    assert (labels != IGNORE_INDEX).sum(dim=1).tolist() == [6, 4]
    hidden = torch.randn(2, 10, 16, generator=generator)
    with torch.no_grad():
        sums = chunked_cross_entropy(hidden, head_function(model), labels, chunk=3)
        logits = model.lm_head(hidden)
    for row, real in ((0, slice(3, 10)), (1, slice(0, 5))):
        expected = functional.cross_entropy(logits[row, real][:-1], ids[row, real][1:], reduction="sum")
        assert sums[row].item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_are_the_next_tokens():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert next_token_labels(ids).tolist() == [[6, 7, -100], [9, 10, -100]]
    assert ids.tolist() == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        GraniteConfig(**SIZES, logits_scaling=3.0),
        Gemma2Config(**SIZES, final_logit_softcapping=1.5),
        Cohere2Config(**SIZES, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_the_head_does_all_that_the_family_does(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        logits = head_function(model)(model.base_model(ids).last_hidden_state)
    assert torch.allclose(logits, expected, atol=1e-6)

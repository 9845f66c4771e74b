"""The pruned model as it is trained: which weights, in which dtype, with its loss, and back to a plain model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunus.model.families import family_of
from prunus.model.loss import chunked_cross_entropy, head_function, next_token_labels
from prunus.model.modules import submodule
from prunus.recovery.objective import BeforeHead, TokenWeights, token_loss
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.vocabulary import VocabularySample, VocabularySampler

__all__ = [
    "Student",
    "add_adapters",
    "before_head",
    "freeze_embeddings_",
    "logits_at_once",
    "merge_adapters_",
]

#: logits in memory at a time, by kind of device: on a CPU the pieces should stay in its caches
LOGITS_AT_ONCE = {"cpu": 2**23}
LOGITS_AT_ONCE_ELSEWHERE = 2**26


def logits_at_once(device: torch.device) -> int:
    """Logits that the loss holds in memory at a time."""
    return LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE_ELSEWHERE)


def add_adapters(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """Put a LoRA adapter on every projection of the decoder layers; everything else is frozen. In place.

    Adapters are float32 whatever the model's dtype, and begin as no change at all. Experts, whose weights are one
    tensor, have none.

    Args:
        model: a causal language model of a described family.
        rank: of the adapters.
        alpha: factor on them, times the rank.
        seed: of their first weights.

    Returns:
        The decoder layers inside peft's wrapper, for `merge_adapters_`.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685
    """
    import peft
    from peft.tuners.lora import LoraLayer

    # Named by the family: peft knows no targets of a model type of ours.
    targets = sorted({projection.name for projection in family_of(model.config).projections})
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for an attribute by the name it had before 5.24.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        model.requires_grad_(False)
        # The layers alone: of a model whose type it knows as a mixture, peft would take experts for the projections.
        layers = submodule(model, family_of(model.config).layers)
        adapted = peft.get_peft_model(layers, config, autocast_adapter_dtype=True)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # In mixed precision autocast casts what needs it; casting inputs to float32 first would be for nothing.
            module.cast_input_dtype_enabled = False
    return adapted


def freeze_embeddings_(model: Any) -> None:
    """Leave the embeddings, input and output, out of what is trained. In place."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)


@torch.no_grad()
def merge_adapters_(adapted: Any) -> None:
    """Add adapters to the weights that they belong to, and leave nothing of peft in the model. In place.

    Each sum is made in float32 and rounded once, to the dtype of the weight; peft's own merging rounds more.

    Args:
        adapted: what `add_adapters` returned.
    """
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            (name,) = module.active_adapters
            weight.copy_(weight.float() + module.get_delta_weight(name).float())
    adapted.unload()


def before_head(model: Any, hidden: Tensor, sample: VocabularySample | None = None) -> BeforeHead:
    """A model's output before its head, for all of the vocabulary or a part of it.

    Args:
        model: the model.
        hidden: hidden states after its final norm, shape (batch, seq_len, hidden_size).
        sample: the entries that the head gives logits for.
    """
    head = model.get_output_embeddings()
    if sample is None:
        return BeforeHead(hidden, head_function(model), [p for p in head.parameters() if p.requires_grad])
    entries = sample.entries.to(hidden.device)
    weight = head.weight.index_select(0, entries)
    bias = None if head.bias is None else head.bias.index_select(0, entries)
    project = partial(functional.linear, weight=weight, bias=bias)
    trained = [part for part in (weight, bias) if part is not None and part.requires_grad]
    return BeforeHead(hidden, head_function(model, project), trained)


class Student(nn.Module):
    """The model that is trained, with its loss as its forward pass.

    The loss has to be made inside: wrappers of data-parallel training gather weights before, and average gradients
    after, the forward pass of the module they are given.

    Args:
        model: the pruned model.
        options: the loss.
        teacher: the dense model, in evaluation mode; None where the loss needs none.
        vocabulary: draws the part of the vocabulary that the loss of each batch looks at; None for all of it.

    Attributes:
        trained: names of the parameters that are trained, tied ones once.
    """

    #: the loss is a mean over the tokens of a batch; Trainer divides it by the batches per step
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: Any,
        options: RecoveryOptions,
        teacher: Any = None,
        vocabulary: VocabularySampler | None = None,
    ):
        super().__init__()
        self.model = model
        self.options = options
        self._vocabulary = vocabulary
        # In a tuple, so that it is no submodule: nothing of it is trained, saved or moved about.
        self._teacher = (teacher,)
        self.trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        # What FSDP may wrap by itself.
        self._no_split_modules = model._no_split_modules
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids: int64, shape (batch, seq_len), without padding.
            labels: not read: a sequence is its own label. Trainer measures a loss where a batch has them.

        Returns:
            `loss`: in training the weighted loss; in evaluation mode the mean next-token loss.
        """
        options, (teacher,) = self.options, self._teacher
        next_tokens = next_token_labels(input_ids)
        head = head_function(self.model)
        if not self.training:
            hidden = self._decoder(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
            losses = chunked_cross_entropy(hidden, head, next_tokens, self._chunk(hidden))
            return {"loss": losses.sum() / (next_tokens.numel() - len(next_tokens))}
        sample = None if self._vocabulary is None else self._vocabulary.draw(input_ids)
        dense = None
        if teacher is not None:
            with torch.no_grad():
                target = self._decoder(teacher)(input_ids=input_ids, use_cache=False).last_hidden_state
            dense = before_head(teacher, target, sample)
        hidden = self._decoder(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
        own = before_head(self.model, hidden, sample)
        weights = TokenWeights(options.kl_weight, options.ce_weight, options.temperature)
        size = None if sample is None else len(sample.entries)
        return {"loss": token_loss(own, next_tokens, weights, dense, self._chunk(hidden, size), sample)}

    def _decoder(self, model: Any) -> Callable[..., Any]:
        decoder: Any = submodule(model, family_of(model.config).layers.rpartition(".")[0])
        return decoder

    def _chunk(self, hidden: Tensor, logits: int | None = None) -> int:
        """Tokens at a time, each with so many logits; by default as many as the vocabulary has entries."""
        each = int(self.model.config.get_text_config().vocab_size) if logits is None else logits
        return max(16, logits_at_once(hidden.device) // each)

    def trained_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that are trained, by name.

        Args:
            state: the whole state, where a wrapper has gathered it.
        """
        whole = self.state_dict() if state is None else state
        return {name: whole[name].detach().cpu().contiguous() for name in self.trained}

    def load_trained_state_(self, state: Mapping[str, Tensor]) -> None:
        """Take weights that `trained_state` gave, in the dtypes that are here."""
        result = self.load_state_dict(dict(state), strict=False)
        assert not result.unexpected_keys
        assert set(self.trained) == state.keys()

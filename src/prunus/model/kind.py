"""Whether a model is what its type says: a causal language model of the stock class, and not something built on it.

A model type names the decoder layers, no more. A classifier, a text encoder or a model with code of its own can have
the type of a family that prunus cuts; it would be scored by a next-token loss that it was not made for, and lose what
makes it what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.errors import UnsupportedModelError
from prunus.model.families import PRUNED_PREFIX, family_of
from prunus.model.known_types import fields_of

__all__ = ["causal_language_model", "check_architecture", "check_attention", "check_own_code"]

#: what the class names of transformers end with, and what such a model is
ENDINGS = {
    "ForSequenceClassification": "a classifier of sequences",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "RewardModel": "a reward model",
    "ForConditionalGeneration": "a multimodal or encoder-decoder model",
    "Model": "a decoder without an output head, as used for embeddings",
}
#: modules that prunus writes into the folders of ragged models
OWN_MODULES = ("configuration_prunus", "modeling_prunus")
#: the code that older checkpoints of a family bring along, and that transformers took over under the same names
ADOPTED_CODE = {
    "phi3": (
        "configuration_phi3.Phi3Config",
        "modeling_phi3.Phi3Model",
        "modeling_phi3.Phi3ForCausalLM",
        "modeling_phi3.Phi3ForSequenceClassification",
        "modeling_phi3.Phi3ForTokenClassification",
    )
}


def check_architecture(config: Any, class_name: str, what: str) -> None:
    """Check that a class is the causal language model of a config's type, of transformers or of prunus.

    Args:
        config: an object with a `model_type`.
        class_name: the class, from `architectures` or of a live model.
        what: what is refused, for the message.

    Raises:
        UnsupportedModelError: it is another class, or the family is not described.
    """
    model_type = family_of(config).model_type
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    # Old checkpoints spell it LLaMAForCausalLM; those of prunus are named after the model type.
    known = {stock, f"Prunus{stock}", f"Prunus{model_type.replace('_', '')}ForCausalLM"}
    if class_name.casefold() in {name.casefold() for name in known}:
        return
    kind = next((kind for ending, kind in ENDINGS.items() if class_name.endswith(ending)), "")
    raise UnsupportedModelError(
        f"{what} is a {class_name}{', ' if kind else ''}{kind}. prunus cuts causal language models, scored by how well "
        f"they predict the next token: of model type {config.model_type!r} that is {stock}. What another class "
        "computes or holds beside the decoder layers would be lost. Prune the language model it was made from, and "
        "train the head again on the result"
    )


def check_attention(config: Any, what: str) -> None:
    """Check that a model's tokens do not see those after them.

    Raises:
        UnsupportedModelError: a config field says that they do, or that there is an encoder.
    """
    for name, value in fields_of(config).items():
        words = name.lower().strip("_").split("_")
        both_ways = any(word.startswith("bidirec") for word in words) and bool(value)
        not_causal = "causal" in words and value is not None and not value
        named = bool({"attention", "attn", "mask"} & {*words}) and "bidirec" in str(value).lower()
        if both_ways or not_causal or named or (name == "is_encoder_decoder" and value is True):
            raise UnsupportedModelError(
                f"{what} has {name} = {value!r}: its tokens see those that come after them, so how well it predicts "
                "the next token says nothing about it. prunus cuts causal language models only"
            )


def check_own_code(references: Mapping[str, Any], config: Any, what: str) -> None:
    """Check that no class of a model comes from code that travels with it, other than that of prunus.

    Args:
        references: the field `auto_map`: class of transformers → where its own one is, `module.Class`.
        config: an object with a `model_type`.
        what: where the field stands, for the message.

    Raises:
        UnsupportedModelError: names the code.
    """
    model_type = family_of(config).model_type
    for auto_class, reference in references.items():
        for name in reference if isinstance(reference, list | tuple) else [reference]:
            if name is None:
                continue
            local = str(name).rpartition("--")[2]
            ours = config.model_type.startswith(PRUNED_PREFIX) and local.partition(".")[0] in OWN_MODULES
            if not ours and local not in ADOPTED_CODE.get(model_type, ()):
                raise UnsupportedModelError(
                    f"{what} brings code of its own: {auto_class} is {name!r}. prunus runs no code that travels with a "
                    f"model, and what it computes may differ from the {model_type} of transformers. If it does not, "
                    "remove the entry auto_map from the file"
                )


def causal_language_model(model: Any) -> Any:
    """The causal language model in what a user gives: `torch.compile` and data parallelism are taken off.

    Args:
        model: a live model; its weights may be anywhere.

    Raises:
        UnsupportedModelError: it is none that prunus can cut: an adapter around one, a classifier, an encoder, a class
            with code of its own, or one that holds more than embedding, decoder layers, norm and head.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # torch.compile's wrapper
            model = model._modules["_orig_mod"]
        else:
            break
    name = type(model).__name__
    # Around the model, as PEFT's classes, or inside it.
    if any(hasattr(type(part), "get_base_layer") for part in (model.modules() if isinstance(model, nn.Module) else ())):
        raise UnsupportedModelError(
            f"the model, a {name}, has adapters that are not merged, which would be lost. Give "
            "model.merge_and_unload() of PEFT"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"the model is a {name}, no causal language model of transformers; take it out of its wrapper, or load it "
            "with AutoModelForCausalLM"
        )
    check_architecture(model.config, name, "the model")
    module = type(model).__module__
    if module.startswith("transformers_modules.") and module.rpartition(".")[2] not in OWN_MODULES:
        raise UnsupportedModelError(
            f"the class {name} comes from code that travels with the model ({module}), and what it computes may differ "
            "from the class of that name in transformers; load the model without trust_remote_code"
        )
    check_attention(model.config, "the model's config")
    family = family_of(model.config)
    described = (family.layers, family.embedding, family.final_norm, family.head)
    for path, part in model.named_modules():
        if getattr(part, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{path} has is_causal = False: its tokens see those that come after them, and prunus cuts causal "
                "language models only"
            )
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{path or 'the model'} was compiled in place, which prunus cannot take off; load the model again, and "
                "compile the result"
            )
        holds = next(part.parameters(recurse=False), None) is not None
        if holds and not any(path == place or path.startswith(place + ".") for place in described):
            raise UnsupportedModelError(
                f"the model holds {path or 'parameters'!r}, which the family {family.model_type!r} does not describe, "
                "and which would be lost"
            )
    return model

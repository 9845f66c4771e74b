"""One job of transformers4_check.py, in an environment with transformers 4 and without prunus.

    python transformers4_load.py FOLDER NAME …

Loads each model FOLDER/NAME by the code that travels with it, uses it in every way, and writes down its answers.
"""

import copy
import json
import sys
from pathlib import Path

sys.modules["prunus"] = None  # importing it raises, wherever it may be installed

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
place, *names = sys.argv[1:]
torch.set_num_threads(1)
batch = load_file(f"{place}/input.safetensors")
prompts, mask = batch["input_ids"], batch["attention_mask"]
answers, texts = {}, {}
for name in names:
    folder = f"{place}/{name}"
    # Gemma 2 has softcapped attention, which sdpa leaves out in transformers 4, of stock models as well.
    options = {"trust_remote_code": True, "dtype": "auto"}
    if "gemma2" in name:
        options["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def say(kind, tensor, name=name):
        answers[f"{name} {kind}"] = tensor.detach().clone()

    with torch.no_grad():
        say("logits", model(prompts, attention_mask=mask).logits[mask.bool()])
    say("greedy", model.generate(prompts, attention_mask=mask, **GREEDY))
    say("beams", model.generate(prompts, attention_mask=mask, **GREEDY, num_beams=3))
    torch.manual_seed(7)
    say("sampled", model.generate(prompts, attention_mask=mask, **{**GREEDY, "do_sample": True}, temperature=3.0))
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts[name] = speak("w5 w77 w12", return_full_text=False, **GREEDY)[0]["generated_text"]
    # Trained a little, with gradient checkpointing and without, saved by transformers 4, and loaded again.
    frugal = copy.deepcopy(model).train()
    frugal.gradient_checkpointing_enable()
    for kind, trained in (("gradient", model.train()), ("gradient, checkpointed", frugal)):
        trained(prompts, attention_mask=mask, labels=prompts.masked_fill(mask == 0, -100)).loss.backward()
        say(kind, torch.cat([parameter.grad.flatten() for parameter in trained.parameters()]))
    model.eval().save_pretrained(f"{folder}-again")
    tokenizer.save_pretrained(f"{folder}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", **options)
    with torch.no_grad():
        say("logits, saved again", again(prompts, attention_mask=mask).logits[mask.bool()])
save_file(answers, f"{place}/answers.safetensors")
Path(place, "texts.json").write_text(json.dumps({"transformers": transformers.__version__, "texts": texts}))

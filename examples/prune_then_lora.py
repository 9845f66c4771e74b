"""Prune a model, train what is left a little with LoRA, and save the result as one ordinary model folder.

    pip install peft
    python examples/prune_then_lora.py --out smollm2-20-lora
    python examples/prune_then_lora.py --model meta-llama/Llama-3.2-1B --text my-text.txt --out llama-20-lora

The text is what the model will be used on; without one, the text that ships with Python stands in.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import prunus

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="folder, Hub id or smollm2-135m")
parser.add_argument("--text", default="default", help="a .txt, .jsonl or .parquet file to calibrate and train on")
parser.add_argument("--out", type=Path, required=True, help="folder for the result")
parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove")
parser.add_argument("--samples", type=int, default=32, help="sequences to calibrate on, and to train on")
parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
parser.add_argument("--steps", type=int, default=50, help="training steps")
parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--rank", type=int, default=16, help="of the adapters")
args = parser.parse_args()

# 1. Prune: half of the sequences measure importance and repair, the others are kept for training; four for measuring.
model, tokenizer = prunus.load_model(args.model)
drawn = prunus.load_calibration(args.text, tokenizer, samples=2 * args.samples + 4, seq_len=args.seq_len)
rest, held_out = drawn.split(4)
fit, training = rest.split(args.samples)
result = prunus.prune(
    model,
    args.ratio,
    fit,
)
del model


def report(name: str, candidate: torch.nn.Module) -> None:
    """One line: size and perplexity."""
    measured = prunus.perplexity_of_windows(candidate, held_out.input_ids, progress=False)
    print(f"{name}: {candidate.num_parameters():,} parameters, perplexity {measured.perplexity:.2f}", flush=True)


report("pruned", result.model)

# 2. LoRA. PEFT knows no target modules of models whose layers differ in width: "all-linear" adapts what is there.
pruned = result.model.float()
adapted = get_peft_model(pruned, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.print_trainable_parameters()
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=args.learning_rate)
adapted.train()
generator = torch.Generator().manual_seed(0)
for step in range(args.steps):
    chosen = torch.randint(len(training), (args.batch_size,), generator=generator)
    input_ids = training.input_ids[chosen]
    loss = adapted(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step + 1} of {args.steps}: loss {loss:.3f}", flush=True)

# 3. Merge the adapters into the weights, and save: the same kind of folder as after pruning, with the plan beside it.
merged = adapted.merge_and_unload().eval()
report("trained", merged)
card = f"# {args.out.name}\n\n{Path(args.model).name}, pruned by prunus and trained with LoRA.\n"
prunus.save_checkpoint(merged, tokenizer, args.out, card=card, extras={"plan.json": result.plan.to_json()})

# 4. It loads as before: `import prunus`, or trust_remote_code=True where prunus is not installed.
report("loaded", AutoModelForCausalLM.from_pretrained(args.out))

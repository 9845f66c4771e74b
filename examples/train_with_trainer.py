"""Train a pruned folder with transformers' own Trainer, as any other model; a folder of the same kind comes out.

    pip install accelerate
    python examples/train_with_trainer.py smollm2-40 --text my-text.txt --out smollm2-40-trained

This is the next-token loss on the text. `prunus recover` distils from the dense model, which gains more per token.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prunus  # registers layers of unequal widths; elsewhere from_pretrained(..., trust_remote_code=True) does

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="written by `prunus prune`")
parser.add_argument("--text", default="default", help="a .txt, .jsonl or .parquet file")
parser.add_argument("--out", type=Path, required=True, help="folder for the result")
parser.add_argument("--samples", type=int, default=256, help="sequences to train on")
parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
parser.add_argument("--steps", type=int, default=64)
parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
parser.add_argument("--learning-rate", type=float, default=3e-4)
parser.add_argument("--device", default="auto", choices=["auto", "cpu"])
args = parser.parse_args()

# Trained weights are float32, or small updates would be rounded away; Trainer's bf16=True is for the passes.
model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.folder)
drawn = prunus.load_calibration(args.text, tokenizer, samples=args.samples, seq_len=args.seq_len)
training = TrainingArguments(
    output_dir=str(args.out.with_name(args.out.name + ".work")),
    max_steps=args.steps,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    lr_scheduler_type="cosine",
    warmup_steps=max(1, args.steps // 20),
    save_strategy="no",
    report_to="none",
    use_cpu=args.device == "cpu",
)
dataset = [{"input_ids": ids, "labels": ids} for ids in drawn.input_ids]
Trainer(model, training, train_dataset=dataset).train()

# With the plan, and the files that let the folder load where prunus is not installed.
plan = (args.folder / "prunus" / "plan.json").read_text(encoding="utf-8")
card = f"# {args.out.name}\n\n{args.folder.name}, trained with transformers' Trainer.\n"
prunus.save_checkpoint(model.cpu().eval(), tokenizer, args.out, card=card, extras={"plan.json": plan})
print(f"saved {args.out}")

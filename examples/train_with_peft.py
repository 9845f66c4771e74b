"""Train LoRA adapters on a pruned folder with PEFT and Trainer: a folder of adapters beside it, which stays as it is.

    pip install peft accelerate
    python examples/train_with_peft.py smollm2-40 --text my-text.txt --out smollm2-40-adapters

To merge the adapters into the weights instead, see prune_then_lora.py.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prunus  # registers layers of unequal widths; elsewhere from_pretrained(..., trust_remote_code=True) does

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="written by `prunus prune`")
parser.add_argument("--text", default="default", help="a .txt, .jsonl or .parquet file")
parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
parser.add_argument("--samples", type=int, default=256, help="sequences to train on")
parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
parser.add_argument("--steps", type=int, default=64)
parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--rank", type=int, default=16, help="of the adapters")
parser.add_argument("--device", default="auto", choices=["auto", "cpu"])
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.folder)
tokenizer = AutoTokenizer.from_pretrained(args.folder)
drawn = prunus.load_calibration(args.text, tokenizer, samples=args.samples, seq_len=args.seq_len)
# PEFT knows no target modules of models whose layers differ in width: "all-linear" adapts what is there, but the head.
adapted = get_peft_model(model, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.print_trainable_parameters()
training = TrainingArguments(
    output_dir=str(args.out.with_name(args.out.name + ".work")),
    max_steps=args.steps,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    save_strategy="no",
    report_to="none",
    use_cpu=args.device == "cpu",
)
dataset = [{"input_ids": ids, "labels": ids} for ids in drawn.input_ids]
Trainer(adapted, training, train_dataset=dataset).train()
adapted.save_pretrained(args.out)

# How they are loaded again.
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.folder), args.out)
ids = drawn.input_ids[:1]
with torch.no_grad():
    difference = (again(ids).logits - adapted.cpu().eval()(ids).logits).abs().max().item()
print(f"saved {args.out}; loaded again, logits differ by at most {difference:.2g}")

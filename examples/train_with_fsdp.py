"""Train a pruned folder on several devices with torch's fully sharded data parallelism (FSDP2).

    torchrun --nproc-per-node 4 examples/train_with_fsdp.py smollm2-40 --text my-text.txt --out smollm2-40-trained

Each process holds a part of every weight, of its gradient and of AdamW's moments. Without GPUs the processes talk by
gloo. Layers of unequal widths are sharded as any others: each by itself.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus  # registers layers of unequal widths; elsewhere from_pretrained(..., trust_remote_code=True) does

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="written by `prunus prune`")
parser.add_argument("--text", default="default", help="a .txt, .jsonl or .parquet file")
parser.add_argument("--out", type=Path, required=True, help="folder for the result")
parser.add_argument("--samples", type=int, default=256, help="sequences to train on")
parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
parser.add_argument("--steps", type=int, default=64)
parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, of all processes together")
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()

kind = "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(kind, (processes,))

model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="float32").to(kind)
tokenizer = AutoTokenizer.from_pretrained(args.folder)
drawn = prunus.load_calibration(args.text, tokenizer, samples=args.samples, seq_len=args.seq_len)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)  # what is left: embeddings, final norm and head

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
generator = torch.Generator().manual_seed(0)  # the same draws in every process, of which each takes its share
for step in range(args.steps):
    chosen = torch.randint(len(drawn), (args.batch_size,), generator=generator)[rank::processes]
    input_ids = drawn.input_ids[chosen].to(kind)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()  # gradients are averaged over the processes
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
        print(f"step {step + 1} of {args.steps}: loss {loss.item():.3f} (of this process)", flush=True)

# The first process gets all weights, and writes a folder of the same kind.
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    whole = AutoModelForCausalLM.from_pretrained(args.folder, dtype="float32")
    whole.load_state_dict(state)
    plan = (args.folder / "prunus" / "plan.json").read_text(encoding="utf-8")
    card = f"# {args.out.name}\n\n{args.folder.name}, trained with FSDP.\n"
    prunus.save_checkpoint(whole.eval(), tokenizer, args.out, card=card, extras={"plan.json": plan})
    print(f"saved {args.out}")
dist.barrier()
dist.destroy_process_group()

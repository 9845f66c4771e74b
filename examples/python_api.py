"""The stages of pruning as Python calls, on the packaged SmolLM2-135M (or any folder or Hub id).

python examples/python_api.py --ratio 0.2 --samples 8
"""

import argparse

import prunus

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--seq-len", type=int, default=256)
parser.add_argument("--out", help="folder to save the result in")
args = parser.parse_args()

model, tokenizer = prunus.load_model(args.model)

# 1. Text → token sequences. The last four are held out, to measure on.
calibration = prunus.load_calibration("default", tokenizer, samples=args.samples + 4, seq_len=args.seq_len)
fit, held_out = calibration.split(4)

# 2. One pass over them → the global table: one row per attention group and MLP channel, cheapest first.
scored = prunus.score(model, fit, prunus.ScoringOptions(method="gate_fisher"))
print(scored.table.head(3).to_string(index=False))

# 3. Table → plan. Nothing here looks at the model; keep at least one key/value head in every layer.
plan = prunus.select(scored.table, scored.geometry, args.ratio, prunus.Constraints(min_keep_attention=1))
print(f"{len(plan.surviving_layers)} of {len(plan.layers)} layers left")

# 4. Plan + model → a smaller model; 5. repair of what is left, in closed form, on the same text.
smaller = prunus.apply_plan(model, plan)
prunus.repair_(smaller, model, plan, list(fit.batches(1)))

# 6. Measure.
for name, candidate in (("dense", model), ("pruned", smaller)):
    result = prunus.perplexity_of_windows(candidate, held_out.input_ids)
    print(f"{name}: {candidate.num_parameters():,} parameters, perplexity {result.perplexity:.2f}")

# 7. Save like any other transformers model; `prunus.save_checkpoint` adds a model card and never leaves half a folder.
if args.out:
    smaller.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

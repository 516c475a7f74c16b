"""The architectures llama.cpp knows, and what their graphs take for granted; those the mlx backend runs.

Source: src/llama-arch.cpp and src/models/*.cpp of llama.cpp as packaged in llama-cpp-python 0.3.36. A
newer llama.cpp knows more; the list is renewed when the dependency is.
"""

from __future__ import annotations

# fmt: off
LLAMA_CPP_ARCHITECTURES: frozenset[str] = frozenset((
    "clip", "llama", "llama4", "deci", "falcon", "grok", "gpt2", "gptj", "gptneox", "mpt",
    "baichuan", "starcoder", "refact", "bert", "modern-bert", "nomic-bert", "nomic-bert-moe",
    "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "bloom", "stablelm", "qwen", "qwen2",
    "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "qwen35",
    "qwen35moe", "qwen4exp", "phi2", "phi3", "phimoe", "plamo", "plamo2", "plamo3", "codeshell",
    "orion", "internlm2", "minicpm", "minicpm3", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4",
    "gemma4-assistant", "gemma-embedding", "starcoder2", "mamba", "mamba2", "maple", "jamba",
    "falcon-h1", "xverse", "command-r", "cohere2", "cohere2moe", "dbrx", "olmo", "olmo2", "olmoe",
    "muse-glimmer", "openelm", "arctic", "deepseek", "deepseek2", "deepseek2-ocr", "deepseek32",
    "deepseek4", "chatglm", "glm4", "glm4moe", "glm-dsa", "bitnet", "t5", "t5encoder", "jais",
    "jais2", "nemotron", "nemotron_h", "nemotron_h_moe", "exaone", "exaone4", "exaone-moe",
    "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "granite", "granitemoe", "granitehybrid",
    "graniteswitch", "granite_swa", "chameleon", "wavtokenizer-dec", "plm", "bailingmoe",
    "bailingmoe2", "bailingmoe3", "dots1", "dots3note", "arcee", "afmoe", "laguna", "ernie4_5",
    "ernie4_5-moe", "hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "hy_v3", "hy_v4", "smollm3",
    "gpt-oss", "lfm2", "lfm2moe", "dream", "smallthinker", "llada", "llada-moe", "seed_oss",
    "grovemoe", "apertus", "minimax-01", "hrm_text", "minimax-m2", "minimax-m3", "cogvlm", "rnd1",
    "pangu-embedded", "mistral3", "eagle3", "dflash", "mistral4", "paddleocr", "mimo2", "step35",
    "spark2_5", "llama-embed", "maincoder", "kimi-linear", "kimi-k3", "glm5-next", "talkie",
    "mellum", "nanbeige", "qwen3tts", "pockettts",
))

# Listed by llama.cpp but no text generator: why, for the message.
NOT_TEXT_MODELS: dict[str, str] = {
    "clip": "an image or audio projector (mmproj) that belongs to another model",
    "wavtokenizer-dec": "a speech decoder",
    "qwen3tts": "a speech synthesizer",
    "pockettts": "a speech synthesizer",
}

# Parts of another model: they may lack embeddings and a vocabulary of their own.
DRAFT_ONLY: frozenset[str] = frozenset(("eagle3", "dflash", "gemma4-assistant"))

# No attention heads at all.
ATTENTION_FREE: frozenset[str] = frozenset(("mamba", "mamba2", "rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"))

# Their graphs assert that keys and values have equally wide heads (abort otherwise).
EQUAL_HEADS: frozenset[str] = frozenset((
    "afmoe", "apertus", "arcee", "arctic", "baichuan", "bailingmoe2", "bert", "bitnet", "bloom",
    "chameleon", "chatglm", "codeshell", "cogvlm", "cohere2", "cohere2moe", "command-r", "dbrx", "deci",
    "deepseek", "dots1", "dream", "ernie4_5-moe", "ernie4_5", "eurobert", "exaone", "falcon", "glm4moe",
    "glm4", "gpt2", "gptneox", "granitehybrid", "granite_swa", "graniteswitch", "granite", "grok",
    "grovemoe", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais", "jais2", "laguna",
    "llada-moe", "llada", "llama", "llama4", "maincoder", "mellum", "minimax-01", "minimax-m2",
    "minimax-m3", "mistral3", "modern-bert", "mpt", "muse-glimmer", "nanbeige", "nemotron_h_moe",
    "nemotron_h", "nemotron", "neo-bert", "olmo", "olmo2", "olmoe", "openelm", "orion", "paddleocr",
    "pangu-embedded", "phi2", "phi3", "plamo", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3",
    "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "qwen4exp", "refact",
    "rnd1", "seed_oss", "smallthinker", "smollm3", "spark2_5", "stablelm", "starcoder", "starcoder2",
    "t5", "xverse",
))

# Their graphs assert that RoPE turns the whole head (abort otherwise).
WHOLE_HEAD_ROPE: frozenset[str] = frozenset((
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "cohere2moe", "dbrx",
    "deci", "deepseek", "dots1", "dream", "ernie4_5-moe", "ernie4_5", "exaone-moe", "exaone", "exaone4",
    "falcon", "granite_swa", "graniteswitch", "granite", "grok", "grovemoe", "hunyuan-moe",
    "hunyuan_vl", "hy_v3", "internlm2", "jais2", "llada-moe", "llada", "llama", "llama4", "maincoder",
    "mellum", "mistral3", "olmo", "olmo2", "olmoe", "orion", "paddleocr", "pangu-embedded", "plamo",
    "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss",
    "smallthinker", "smollm3", "starcoder2", "talkie", "xverse",
))
# fmt: on

# `model_type` of config.json: those whose mlx-lm class has been run against our cache (tests do). Others
# mix in recurrent states, sliding windows or caches of their own.
MLX_MODEL_TYPES: frozenset[str] = frozenset(("llama", "mistral", "qwen2", "qwen3"))

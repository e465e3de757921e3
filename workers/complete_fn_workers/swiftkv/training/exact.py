"""`complete-fn swiftkv check`: compares vLLM's answers with the reference model's, token by token."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from complete_fn_workers.swiftkv.checkpoint import load_model
from complete_fn_workers.swiftkv.reference import Llama

# Lengths around the edges of the blocks that engines use, and long ones.
LENGTHS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 777, 1023, 1500, 1999, 2000)
TOLERANCE = 1e-3  # largest difference of a log-probability; float32 engines stay below 1e-4

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 2304,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 400,
    "kv_cache_memory_bytes": 2**28,
    "skip_tokenizer_init": True,
}

Prompt = list[int]

# Keeps all engines alive: when one of several in-process engines is collected, vLLM ends process-wide groups.
STARTED: list[Any] = []


@dataclass(frozen=True)
class Agreement:
    """Agreement over all answered positions.

    Attributes:
        same: tokens that are the reference's first choice.
        worst: the largest difference of a (natural) log-probability among the first five; infinite if one is NaN.
    """

    positions: int
    same: int
    worst: float

    @property
    def exact(self) -> bool:
        return 0 < self.positions == self.same and self.worst <= TOLERANCE


def serve(folder: Path, **settings: Any) -> Any:
    """A `vllm.LLM` of the model in `folder`, with `SETTINGS` as changed by `settings`."""
    from vllm import LLM

    STARTED.append(LLM(str(folder), **(SETTINGS | settings)))
    return STARTED[-1]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Prompt]:
    choose = random.Random(seed)
    return [[choose.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


def ask(llm: Any, prompts: list[Prompt], max_tokens: int = 8, **sampling: Any) -> list[Any]:
    """Greedy answers in the prompts' order, with the first five log-probabilities."""
    from vllm import SamplingParams

    asked: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 5, "ignore_eos": True}
    params = SamplingParams(**(asked | {"detokenize": False} | sampling))
    answers: list[Any] = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return answers


@torch.no_grad()
def agreement(model: Llama, prompts: list[Prompt], answers: list[Any]) -> Agreement:
    """Teacher-forced agreement: each answer token is judged given the tokens that vLLM itself wrote before it."""
    forward = model if model.swiftkv is None else model.student
    positions = same = 0
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(answer.outputs[0].token_ids)
        states = forward(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
        expected = model.logits(states).float().log_softmax(-1)
        for token, row, given in zip(ids, expected, answer.outputs[0].logprobs, strict=True):
            positions += 1
            same += int(row.argmax()) == token
            differences = (abs(entry.logprob - float(row[i])) for i, entry in given.items())
            worst = max([worst, *(math.inf if math.isnan(d) else d for d in differences)])
    return Agreement(positions, same, worst)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="complete-fn swiftkv check", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--outputs", type=int, default=8, help="tokens to generate for each prompt")
    parser.add_argument("--set", type=json.loads, default={}, help="engine arguments as JSON, as vLLM names them")
    a = parser.parse_args(argv)
    model = load_model(a.model)
    lengths = [n for n in LENGTHS if n + a.outputs < model.shape.max_position_embeddings]
    prompts = random_prompts(lengths, model.shape.vocab_size)
    llm = serve(a.model, disable_log_stats=False, **a.set)
    found = agreement(model, prompts, ask(llm, prompts, a.outputs))
    print(f"{found.same}/{found.positions} tokens agree, largest log-probability difference {found.worst:.2g}")
    drafted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens")
    if drafted:
        print(f"{drafted} tokens drafted")
    return 0 if found.exact else 3


if __name__ == "__main__":
    raise SystemExit(main())

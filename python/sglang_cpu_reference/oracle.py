"""Greedy tokens and log-probabilities by ``transformers``, which shares no code with SGLang."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Completion(NamedTuple):
    """A greedy completion of T tokens.

    token_ids: T chosen tokens. logprobs: their T natural-log probabilities. top: for each of the T
    positions the most likely tokens as (token id, log-probability), best first.
    """

    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]


def reference_of(model_type: str) -> Any | None:
    """The class that stands for a model type that transformers lacks; None for all others."""
    if model_type != "bailing_hybrid":
        return None
    from sglang_cpu_reference.bailing import BailingMoeV2_5ForCausalLM

    return BailingMoeV2_5ForCausalLM


class Oracle:
    """A checkpoint loaded by transformers, in fp32 on the CPU.

    attention: its implementation there; ``sdpa`` reads thousands of tokens in half the time.
    """

    def __init__(self, checkpoint: Path | str, attention: str = "eager") -> None:
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            PreTrainedConfig,
        )

        if reference := reference_of(PreTrainedConfig.get_config_dict(checkpoint)[0]["model_type"]):
            kind: Any = reference
        else:
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
            kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
        self.model = kind.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()

    @torch.inference_mode()
    def read(self, input_ids: Sequence[int], chunk: int = 512) -> tuple[list[float], Any]:
        """Natural-log probability of every token but the first; and the cache of them all."""
        logprobs: list[float] = []
        cache, last = None, torch.empty(0)
        for part in torch.tensor([input_ids]).split(chunk, dim=1):
            result = self.model(part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            rows = torch.log_softmax(result.logits[0].float(), dim=-1)
            # Row i foretells the next token; the last of a chunk, the first of the next.
            before = torch.cat([last, rows[:-1]])
            logprobs += before.gather(1, part[0, -len(before) :, None])[:, 0].tolist()
            last = rows[-1:]
        return logprobs, cache

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        top_logprobs: int = 5,
        cache: Any = None,
    ) -> Completion:
        """Complete one prompt greedily, never stopping early; top_logprobs entries a position.

        cache: of tokens before the prompt, from `read`; it is written to.
        """
        completion = Completion([], [], [])
        tokens = list(input_ids)
        for _ in range(max_new_tokens):
            result = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            _choose(completion, result.logits[0, -1], top_logprobs)
            tokens = completion.token_ids[-1:]
        return completion

    @torch.inference_mode()
    def follow(
        self,
        input_ids: Sequence[int],
        answer: Sequence[int],
        cache: Any,
        top_logprobs: int = 5,
    ) -> Completion:
        """What `generate` chooses behind each part of an answer, all in one pass.

        Where that is the answer itself, it is what `generate` says. cache: of tokens before the
        prompt, from `read`; it is left as it was.
        """
        completion = Completion([], [], [])
        tokens = torch.tensor([[*input_ids, *answer[:-1]]])
        logits = self.model(tokens, past_key_values=cache, use_cache=True).logits[0]
        cache.crop(-tokens.shape[1])
        for row in logits[len(input_ids) - 1 :]:
            _choose(completion, row, top_logprobs)
        return completion


def _choose(completion: Completion, logits: torch.Tensor, top_logprobs: int) -> None:
    """Append the likeliest token by logits [vocabulary]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logprobs, max(2, top_logprobs))
    completion.top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    chosen, logprob = completion.top[-1][0]
    completion.token_ids.append(chosen)
    completion.logprobs.append(logprob)

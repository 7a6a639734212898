"""Reads a folder in the schema of `DeciLMForCausalLM` as vLLM does, in plain torch: stands for it where it cannot run.

It shares no code with transformers' models. As in vLLM, a layer hands on two tensors, what it adds and the stream before that,
and each norm adds them first.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig

from ..base.errors import LLMDropError


class DeciReader:
    """A folder that `export_deci` wrote. Its configuration_decilm.py is run, as servers do: give it no folder of others.

    Raises LLMDropError unless the weights are those that config.json names.
    """

    def __init__(self, folder: Path):
        self.settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.weights |= load_file(file)
        self.used: set[str] = set()

    @torch.inference_mode()
    def logits(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """After each prompt: float32 (vocabulary,)."""
        logits = [self._forward(torch.tensor(prompt)) for prompt in prompts]
        if unused := sorted(set(self.weights) - self.used):
            raise LLMDropError(
                f"The folder holds {len(unused)} weights that its config.json has no place for, such as {unused[0]}."
            )
        return logits

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        config = self.config
        added, stream = functional.embedding(tokens, self._get("model.embed_tokens.weight")), None
        cos, sin = self._rotary(len(tokens))
        for index, block in enumerate(config.block_configs):
            prefix = f"model.layers.{index}"
            if not block.attention.no_op:
                x, stream = self._norm(f"{prefix}.input_layernorm", added, stream)
                if block.attention.replace_with_linear:
                    added = self._linear(f"{prefix}.self_attn.linear", x, config.attention_bias)
                else:
                    added = self._attention(f"{prefix}.self_attn", x, block.attention.n_heads_in_group, cos, sin)
            if not block.ffn.no_op:
                x, stream = self._norm(f"{prefix}.post_attention_layernorm", added, stream)
                width = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
                added = self._mlp(f"{prefix}.mlp", x, -(-width // 256) * 256)
        x, _ = self._norm("model.norm", added, stream)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return functional.linear(x[-1], self._get(f"{head}.weight")).float()

    def _get(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise LLMDropError(f"The folder lacks {name}, which its config.json promises.")
        self.used.add(name)
        return self.weights[name]

    def _norm(self, name: str, added: torch.Tensor, stream: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream = added if stream is None else stream + added
        wide = stream.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._get(f"{name}.weight") * scaled.to(stream.dtype), stream

    def _linear(self, name: str, x: torch.Tensor, has_bias: bool) -> torch.Tensor:
        return functional.linear(x, self._get(f"{name}.weight"), self._get(f"{name}.bias") if has_bias else None)

    def _attention(self, name: str, x: torch.Tensor, group: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self._linear(f"{name}.{part}_proj", x, self.config.attention_bias)
            .unflatten(-1, (-1, cos.shape[-1]))
            .transpose(0, 1)
            for part in "qkv"
        )
        if len(q) != group * len(k):
            raise LLMDropError(f"{name} has {len(q)} heads for {len(k)} of keys, but its config.json says {group} to one.")
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(f"{name}.o_proj", mixed.transpose(0, 1).flatten(1), self.config.attention_bias)

    def _mlp(self, name: str, x: torch.Tensor, width: int) -> torch.Tensor:
        gate, up = (self._linear(f"{name}.{part}_proj", x, False) for part in ("gate", "up"))
        if gate.shape[-1] != width:
            raise LLMDropError(f"{name} is {gate.shape[-1]} wide, but its config.json says {width}.")
        return self._linear(f"{name}.down_proj", functional.silu(gate) * up, False)

    def _rotary(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By the old names of the settings, which servers read."""
        n = self.config.hidden_size // self.config.num_attention_heads
        frequencies = 1.0 / self.settings["rope_theta"] ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
        if scaling := self.settings.get("rope_scaling"):
            frequencies = frequencies / scaling["factor"] if scaling["rope_type"] == "linear" else _llama3(frequencies, scaling)
        angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def _llama3(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Slow frequencies are divided by the factor, fast ones stay, and those between are mixed (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling["factor"]

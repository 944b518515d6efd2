"""A stack of decoder layers between an embedding and a head: what the families share. A family says how its config is read and what
stands in a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from xllm_py.base.process import give_back_memory
from xllm_py.device.base import AttentionBatch, Device, Turn
from xllm_py.model.base import Stored
from xllm_py.model.config import ModelConfig
from xllm_py.model.fields import Fields
from xllm_py.model.layers.attention import Attention
from xllm_py.model.layers.parts import Parts
from xllm_py.model.layers.rope import Rope
from xllm_py.model.sharding import Shard, embedded
from xllm_py.model.weights import Part, WeightSource

_WHOLE = Shard()
FeedForward = Callable[[Tensor, int, Tensor], Tensor]  # GatedMlp or Experts


class Layer:
    """Attention and a feed-forward part, each behind a norm and added to what it was given."""

    def __init__(self, parts: Parts, index: int, attention: Attention, feed: FeedForward) -> None:
        at = f"model.layers.{index}"
        self._norm = parts.norm(f"{at}.input_layernorm")
        self._norm_after = parts.norm(f"{at}.post_attention_layernorm")
        self._attention = attention
        self._feed = feed

    def __call__(
        self, x: Tensor, turn: Turn, batch: AttentionBatch, stored: Stored | None
    ) -> Tensor:
        """x: [tokens, hidden]. `stored` is called when this layer's keys and values are in the cache."""
        x = self._attention(self._norm(x), x, turn, batch, stored)
        return self._feed(self._norm_after(x), batch.slots.shape[0], x)


class Decoder(ABC):
    """Implements model.base.Model."""

    @classmethod
    @abstractmethod
    def read(cls, fields: Fields) -> ModelConfig:
        """The family's config. Raises ModelLoadError that names file and field."""

    @abstractmethod
    def layer(self, parts: Parts, index: int) -> Layer:
        """Build one layer from the tensors it takes."""

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        weights: WeightSource,
        max_position: int,
        *,
        int8: bool = False,
        shard: Shard = _WHOLE,
    ) -> None:
        self.config = config
        self._shard = shard
        parts = Parts(config, device, weights, int8, shard)
        vocabulary = (config.vocab_size, config.hidden_size)
        rows = self._vocabulary_part()
        embedding = weights.take("model.embed_tokens.weight", vocabulary, rows)
        self.dtype = embedding.dtype
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(self.layer(parts, index))
            give_back_memory()  # what tensors were read into: kept, it is an eighth of the model
        self._norm = parts.norm("model.norm")
        head = embedding if config.tied else weights.take("lm_head.weight", vocabulary, rows)
        self._head = device.pack_head(head)
        # a tied one is read from the packed head: there is no second copy
        self._embedding = None if config.tied else device.put(embedding)
        weights.finish(
            ("lm_head.weight", "rotary_emb.inv_freq") if config.tied else ("rotary_emb.inv_freq",)
        )
        self._rope = Rope(
            config.rope,
            head_dim=config.head_dim,
            max_position=max_position,
            dtype=self.dtype,
            put=device.put,
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        stored: Stored | None = None,
    ) -> Tensor:
        """See Model."""
        x = embedded(self._shard, token_ids, self.config.vocab_size, self._embed)
        turn = self._rope.at(positions)
        for layer in self._layers:
            x = layer(x, turn, batch, stored)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """See Model."""
        mine = self._head(hidden)
        if self._shard.count == 1:
            return mine
        here, each = self._shard.vocabulary(self.config.vocab_size)
        mine = functional.pad(mine, (0, each - len(here)))
        return self._shard.ranks.columns(mine)[:, : self.config.vocab_size]

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._embedding is None:
            return self._head.embed(token_ids)
        return functional.embedding(token_ids, self._embedding)

    def _vocabulary_part(self) -> Part:
        """Which rows of embedding and head are here."""
        if self._shard.count == 1:
            return ()
        here, _ = self._shard.vocabulary(self.config.vocab_size)
        return (slice(here.start, here.stop), slice(None))

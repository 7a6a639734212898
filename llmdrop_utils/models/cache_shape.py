"""What a model's key-value cache holds for each layer and token, told by its configuration."""

from .families import MIXERS, first_of, stream_width

INDEXED = ("indexed_attention", "deepseek_sparse_attention")  # sparse attention, which keeps keys of an index as well


def is_full_attention(config) -> bool:
    """Does every layer keep every token? Then the cache shrinks by exactly the share of attention that is dropped."""
    geometry = cache_geometry(config.get_text_config())
    return all(window is None and numbers == geometry[0][0] for numbers, window in geometry)


def cache_geometry(config) -> list[tuple[int, int | None]]:
    """For each layer, how many numbers a token leaves in the cache, and how many tokens attention can see (None: all).

    Mixers of hybrid models (Mamba, convolutions) leave none: their states do not grow, and are not counted.
    """
    kinds = getattr(config, "layer_types", None)
    layers = config.per_layer_config  # the configuration itself, unless layers differ
    return [_of_layer(layer, kinds[index] if kinds else None) for index, layer in enumerate(layers)]


def _of_layer(config, kind: str | None) -> tuple[int, int | None]:
    """Numbers and window of a layer of this kind; None: it follows from the windows that there are."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kind = kind or ("sliding_attention" if window else "chunked_attention" if chunk else "full_attention")
    return _numbers(config, kind), {"sliding_attention": window, "chunked_attention": chunk}.get(kind)


def _numbers(config, kind: str) -> int:
    """How many numbers a token leaves in the cache of a layer of this kind."""
    if kind in MIXERS:
        return 0
    index = config.index_head_dim if kind in INDEXED else 0
    if rank := getattr(config, "kv_lora_rank", None):
        return rank + config.qk_rope_head_dim + index
    if config.model_type == "mimo_v2_flash":
        heads = config.num_key_value_heads * (2 if kind == "sliding_attention" else 1)
        return heads * (config.head_dim + config.v_head_dim)
    return 2 * _kv_heads(config) * head_size(config) + index


def numbers_multiplied(config) -> int:
    """How many numbers a token multiplies for each token it sees: its queries with keys, its scores with values.

    config: of the layer, where layers differ.
    """
    heads = first_of(config, "num_attention_heads", "n_head")
    if getattr(config, "kv_lora_rank", None):
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return heads * (head_size(config) + (getattr(config, "v_head_dim", None) or head_size(config)))


def _kv_heads(config) -> int:
    if config.model_type == "falcon":  # transformers repeats the shared heads of Falcon-40B before it caches them
        return 1 if config.multi_query and not config.new_decoder_architecture else config.num_attention_heads
    if config.model_type == "gpt_bigcode":
        return 1 if config.multi_query else config.num_attention_heads
    if config.model_type == "dbrx":
        return config.attn_config.kv_n_heads
    if not hasattr(type(config), "num_key_value_heads"):  # none are shared, whatever else a configuration says
        return first_of(config, "num_attention_heads", "n_head")
    return first_of(config, "num_key_value_heads", "num_attention_heads")


def head_size(config) -> int:
    """Width of one head of attention."""
    size = getattr(config, "head_dim", None)
    return size or stream_width(config) // first_of(config, "num_attention_heads", "n_head")

"""Families of transformers' models that are known, and why they cannot be taken apart: decoders, encoders, and both in one."""

UNSTATED = "nobody has stated and tested yet where its attention and MLP are (its norms act on the residual stream itself)"
HALF = "it is the decoder of an encoder-decoder, made to read what an encoder gives"
STREAMS = "it mixes several residual streams (hyper-connections), so a sub-layer adds to none of them alone"
SCALED = "its layers multiply the residual stream itself by learned numbers, so that it is no sum of terms"
NO_ATTENTION = "it has no attention"
DRAFT = "it drafts tokens for another model, whose cache it reads"
UNTESTED = "nobody has stated and tested yet where its attention and MLP are"
STAGES = "its layers stand in stages of different widths, so that no residual stream goes through all of them"
OUTSIDE = "its layers multiply what they add by learned vectors outside of any module"
NOT_ALONE = "transformers' AutoModel cannot load it without the text encoder beside it"
THREE = "a third term is added to the residual stream in each layer, beside attention and MLP"

REFUSED: dict[str, str] = {
    **dict.fromkeys(["bert-generation", "big_bird", "roc_bert", "roformer", "xmod"], UNSTATED),
    **dict.fromkeys(["git", "xlm", "xlnet", "openai-gpt", "minimax"], UNSTATED),
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"], HALF),
    **dict.fromkeys(["musicgen_decoder", "musicgen_melody_decoder", "plbart", "prophetnet", "trocr", "whisper"], HALF),
    **dict.fromkeys(["deepseek_v4", "hy_v4", "qwen4_exp_text"], STREAMS),
    **dict.fromkeys(["beam", "doge", "gemma4_text", "gemma4_unified_text", "zaya"], SCALED),
    **dict.fromkeys(["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"], NO_ATTENTION),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], DRAFT),
    "falcon_h1": f"{THREE}: Mamba",
    "gemma3n_text": "it has four residual streams, which its layers predict and correct",
    "inkling_text": "convolutions follow attention and MLP, and keep a cache of their own",
    "inkling2_text": "its sub-layers read a mixture of earlier layers instead of one residual stream",
    "nemotron_h": "each of its layers holds attention, MLP or Mamba alone, and not a pair of attention and MLP",
    **dict.fromkeys(["zamba", "zamba2"], "its layers share one attention, which reads the embeddings as well"),
    "olmo_hybrid": "its layers with attention and those without are built in two ways",
    "longcat_flash": "each of its layers holds two attentions and three MLPs",
    "hrm_text": "it passes the same layers several times",
    "glm_moe_dsa": "layers use the tokens that the attention of an earlier layer chose",
    "blt": "it reads bytes by three decoders in a row",
    "mllama_text_model": "some of its layers attend to images alone",
    "cpmant": "its modules add their terms to the residual stream themselves, without letting them be seen",
    "gpt_neox_japanese": "a bias outside of its attention is a part of what the attention adds",
    "reformer": "it has two residual streams, and its attention shares queries and keys by hashing",
    # Encoders of text.
    "albert": "its layers share their weights, so that none can be dropped alone",
    "fnet": NO_ATTENTION,
    "funnel": "it shortens its text on the way, so that tokens have no stream of their own",
    "perceiver": "a few learned states read its input, and only they pass its layers",
    "mobilebert": "each of its layers is a bottleneck with several MLPs",
    **dict.fromkeys(["convbert", "esmc", "flaubert", "ibert", "layoutlm", "longformer", "luke", "mra"], UNTESTED),
    **dict.fromkeys(["neomme", "nystromformer", "squeezebert", "tapas", "tipsv2_vision_model", "yoso"], UNTESTED),
    **dict.fromkeys(["clip_text_model", "siglip_text_model"], "of a pair of encoders the one for images is taken"),
    # Encoders of images.
    **dict.fromkeys(["bit", "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "focalnet", "hgnet_v2"], NO_ATTENTION),
    **dict.fromkeys(["mobilenet_v1", "mobilenet_v2", "poolformer", "pp_lcnet", "regnet", "resnet", "textnet"], NO_ATTENTION),
    **dict.fromkeys(["cvt", "dinat", "donut-swin", "hiera", "levit", "mobilevit", "mobilevitv2"], STAGES),
    **dict.fromkeys(["pvt", "pvt_v2", "segformer", "swiftformer", "swin", "swinv2"], STAGES),
    **dict.fromkeys(["beit", "data2vec-vision"], OUTSIDE),
    "vit_mae": "it reads a random part of the patches of an image, another one each time",
    "siglip2_vision_model": "it reads patches and their places. SigLIP 2 of one size is a siglip model, which works",
    **dict.fromkeys(["altclip_vision_model", "blip_vision_model", "blip_2_vision_model"], NOT_ALONE),
    **dict.fromkeys(["clipseg_vision_model", "metaclip_2_vision_model"], NOT_ALONE),
}

SPARSE = "nobody has stated and tested yet where the parts of its sparse attention are"
EXPERTS = "nobody has stated and tested yet where its experts are"
HEARS = "it reads sound"

REFUSED_ENCODER_DECODERS: dict[str, str] = {
    **dict.fromkeys(["bigbird_pegasus", "led", "longt5", "pegasus_x"], SPARSE),
    **dict.fromkeys(["nllb-moe", "switch_transformers"], EXPERTS),
    **dict.fromkeys(["speech_to_text", "speecht5", "whisper"], HEARS),
    **dict.fromkeys(["seamless_m4t", "seamless_m4t_v2"], "it reads sound as well as text, by two encoders"),
    **dict.fromkeys(["t5gemma", "t5gemma2"], "nobody has stated and tested yet where its attention and MLP are"),
    "encoder-decoder": "its halves are models of two families, of which nobody has tested a pair yet",
    "fsmt": "its layers hold tokens before samples",
    "prophetnet": "its decoder predicts several tokens ahead, in several streams",
}

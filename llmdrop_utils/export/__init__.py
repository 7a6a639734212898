MODEL_TYPE = "llmdrop_utils"  # of dropped models, in config.json: transformers alone names it when it refuses them

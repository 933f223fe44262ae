"""Register the classes of this package with the Auto classes of Transformers when it is imported."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .compat_nanovlm import AUTO_MODEL_CLASSES, register_image_processor
from .configuration_nanovlm import NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig
from .image_processing_nanovlm import NanoVLMImageProcessor
from .modeling_nanovlm import NanoVLMForConditionalGeneration, NanoVLMModel, NanoVLMTextModel, NanoVLMVisionModel
from .processing_nanovlm import NanoVLMProcessor

for _config_class, _model_class in (
    (NanoVLMConfig, NanoVLMModel),
    (NanoVLMVisionConfig, NanoVLMVisionModel),
    (NanoVLMTextConfig, NanoVLMTextModel),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _model_class, exist_ok=True)
for _auto_class in AUTO_MODEL_CLASSES:
    _auto_class.register(NanoVLMConfig, NanoVLMForConditionalGeneration, exist_ok=True)
register_image_processor(NanoVLMConfig, NanoVLMImageProcessor)
AutoProcessor.register(NanoVLMConfig, NanoVLMProcessor, exist_ok=True)

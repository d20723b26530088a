"""What `vlbridge.serving.serving_vllm` overrides or calls of vLLM, and the releases of vLLM that it was tried with.

vLLM is not imported here. `make serving` checks the names against the release that it installs.
"""

from .compat import Name


# Releases of vLLM that the plugin was tried with: what plugins may override changes between releases
TRIED = ("0.32", "0.33")

_PROCESSOR = "vllm.multimodal.processing.BaseMultiModalProcessor"
# What is overridden or called here, with the parameters that it must take
NAMES = (
    Name(f"{_PROCESSOR}.apply", "the Q-Former's instruction", ("inputs", "timing_ctx")),
    Name(f"{_PROCESSOR}._get_hf_mm_text", "one placeholder per image", ("mm_counts",)),
    Name(f"{_PROCESSOR}._get_mm_fields_config", "which rows belong to which image", ("hf_inputs",)),
    Name(f"{_PROCESSOR}._get_prompt_updates", "visual tokens per image", ("mm_items", "out_mm_kwargs")),
    Name("vllm.multimodal.processing.BaseProcessingInfo.get_hf_processor", "without a request's arguments"),
    Name("vllm.multimodal.processing.BaseProcessingInfo.get_supported_mm_limits", "images only"),
    Name("vllm.multimodal.processing.ProcessorInputs", "the instruction, hashed with images",
         ("hf_processor_mm_kwargs",)),
    Name("vllm.multimodal.processing.BaseDummyInputsBuilder.get_dummy_mm_data", "the largest picture",
         ("seq_len", "mm_counts", "mm_options")),
    Name("vllm.multimodal.processing.BaseDummyInputsBuilder._get_dummy_images", "the same",
         ("width", "height", "num_images", "overrides")),
    Name("vllm.model_executor.models.interfaces.SupportsMultiModal.configure_mm_token_handling",
         "placeholders beyond the table", ("vocab_size", "mm_token_ids")),
    Name("vllm.model_executor.models.interfaces.SupportsMultiModal._mark_language_model", "what LoRA applies to"),
    Name("vllm.model_executor.models.interfaces.SupportsMultiModal._mark_tower_model", "the encoder and the bridge"),
)  # fmt: skip

__all__ = ["NAMES", "TRIED"]

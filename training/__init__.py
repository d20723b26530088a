"""Training bridges."""

from .training_peft import ia3_config, lora_config


__all__ = ["ia3_config", "lora_config"]

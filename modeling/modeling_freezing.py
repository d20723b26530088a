"""Freezing: the bridge is always trained, the vision encoder and the language model only on request."""

from __future__ import annotations

from torch import nn
from transformers import GradientCheckpointingLayer
from transformers.utils import logging

from .modeling_pins import summary
from .modeling_quantization import is_quantized, is_quantized_tensor, keep_unpacked, quantized_layers


logger = logging.get_logger(__name__)


class FreezingMixin:
    """`freeze()`, and frozen parts that stay in eval mode."""

    def freeze(self, vision_model: bool = True, language_model: bool = True) -> nn.Module:
        """Choose which parts are trained. The bridge always is.

        Args:
            vision_model: Freeze the vision encoder: no gradients, and always in eval mode.
            language_model: Freeze the language model in the same way.

        Returns:
            The model itself.

        Raises:
            ValueError: A part that should be trained is quantised.
        """
        for name, frozen in (("vision_model", vision_model), ("language_model", language_model)):
            if not frozen and is_quantized(getattr(self, name)):
                raise ValueError(
                    f"freeze({name}=False): the {name} is quantised, and quantised weights can't be trained. Train "
                    "adapters (LoRA) on them, or load the part without quantization_config."
                )
        self.config.freeze_vision_model, self.config.freeze_language_model = vision_model, language_model
        parts = ((vision_model, self.vision_model), (language_model, self.language_model), (False, self.bridge))
        for frozen, part in parts:
            for parameter in part.parameters() if part is not None else ():
                if not is_quantized_tensor(parameter):
                    parameter.requires_grad_(not frozen)
        return self.train(self.training)

    def _freeze_as_configured(self) -> nn.Module:
        """`freeze()` what the configuration says. Quantised parts are frozen in any case, for they can't be trained."""
        frozen = {"vision_model": self.config.freeze_vision_model, "language_model": self.config.freeze_language_model}
        for part in [part for part, already in frozen.items() if not already and is_quantized(getattr(self, part))]:
            frozen[part] = True
            logger.info(f"The {part} is quantised and therefore frozen, although it was trained before.")
        return self.freeze(**frozen)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the training mode of the trained parts. Frozen ones stay in eval mode: no dropout, no running statistics.

        Args:
            mode: Whether to set training or eval mode.
        """
        for part in (self.vision_model, self.language_model):
            restore_dropout(part)
        super().train(mode)
        if mode and not any(weight.requires_grad for weight in self.bridge.parameters()):
            self.bridge.eval()  # an adapter has frozen it
        if mode and self.config.freeze_vision_model:
            self._warn_about_adapters_of_vision()
        for frozen, part in (
            (self.config.freeze_vision_model, self.vision_model),
            (self.config.freeze_language_model, self.language_model),
        ):
            if not frozen or part is None:
                continue
            part.eval()
            for name, layer in quantized_layers(part) if self._has_quantized_parts else ():
                layer.training = mode  # they have no dropout, and compute without gradients in eval mode on a CPU
                if name.endswith("base_layer"):  # PEFT reads and writes the weights when it merges its adapters
                    keep_unpacked(layer)
            for layer in part.modules() if mode else ():
                if hasattr(layer, "base_layer"):  # a PEFT adapter around a frozen layer: the adapter is in training
                    layer.training = True
                    for name, child in layer.named_children():
                        if name != "base_layer":
                            child.train()
                # A layer checkpoints its activations in train mode only. Its children stay in eval mode, and dropout
                # that the layer applies itself (OPT) is set to zero.
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = True
                    suspend_dropout(layer)
        return self

    def _warn_about_adapters_of_vision(self) -> None:
        """Name the layers of the frozen encoder that an adapter reaches, unless its expression names the encoder.

        `Trainer` calls `train()` in every step: adapters are looked at once.
        """
        adapters = getattr(self, "peft_config", None) or {}
        if list(adapters) == self.__dict__.setdefault("_adapters_seen", []):
            return
        self._adapters_seen = list(adapters)
        targets = [config.target_modules for config in adapters.values() if hasattr(config, "target_modules")]
        if not targets or any(isinstance(target, str) and "vision_model" in target for target in targets):
            return
        reached = [name for name, layer in self.vision_model.named_modules() if hasattr(layer, "base_layer")]
        if reached:
            logger.warning_once(
                f"The adapter reaches {len(reached)} layers of the frozen vision_model too, and trains them: "
                f"{summary(reached)}. Leave them out with exclude_modules=r'vision_model\\..*', or name the language "
                "model's layers, as vlbridge.training.training_peft.lora_config does; target_modules=<a regular "
                "expression with vision_model> says that they are meant."
            )

    def checkpointing_changed(self) -> None:
        """Update the training modes; called after gradient checkpointing was enabled or disabled."""
        self.train(self.training)


def suspend_dropout(layer: nn.Module) -> None:
    """Set a layer's own dropout probabilities to 0.0, until `restore_dropout`."""
    found = {name: value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)}
    vars(layer).setdefault("_suspended_dropout", found)
    for name in found:
        setattr(layer, name, 0.0)


def restore_dropout(part: nn.Module | None) -> None:
    """Restore the dropout probabilities of a part's layers that `suspend_dropout` has set to 0.0."""
    for layer in part.modules() if part is not None else ():
        for name, value in vars(layer).pop("_suspended_dropout", {}).items():
            setattr(layer, name, value)


__all__ = ["FreezingMixin"]

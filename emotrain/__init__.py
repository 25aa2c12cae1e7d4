"""emotrain: LoRA training for text-to-image models with the emo optimizers, LR 1.0 and an end that comes by itself."""

__version__ = "0.2.0"
